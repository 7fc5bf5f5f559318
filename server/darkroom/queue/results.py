"""The result store: finished pictures outside Redis, in a bucket or a directory.

A picture lies at `<shard>/<job id>/<attempt>-<8 random digits>-<index>.<format>`, where no other worker writes or
removes: one that has lost its lease cannot touch the pictures of the one that owns the job now, even where a failover
has made Redis forget a claim and both have the same attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import msgspec
import structlog

from darkroom import metrics
from darkroom.config import Settings
from darkroom.errors import ConfigError, JobError, ResultStoreUnavailable, shorten
from darkroom.jobs import Job, Result

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSStore, LocalStore, RetryConfig, S3Store

log = structlog.get_logger(__name__)

# Nothing else ever reaches the store, whatever a damaged record holds. An earlier release had no random digits.
_KEY = re.compile(r"[a-zA-Z0-9_-]{1,32}/[0-9a-f]{26}/[0-9]{1,9}(-[0-9a-f]{8})?-[0-9]{1,3}\.(png|jpeg|webp)")
_JOB_ID = re.compile(r"[0-9a-f]{26}")
# A picture, or what a crash left of one on its way to its name.
_FILE = re.compile(r"[0-9]{1,9}(-[0-9a-f]{8})?-[0-9]{1,3}\.(png|jpeg|webp)(#[0-9]+)?")

# An http:// endpoint is the operator's choice.
_CLIENT_OPTIONS: ClientConfig = {"allow_http": True, "connect_timeout": "2s", "timeout": "10s"}
# For a blip; a worker waits out longer outages by itself, and a client comes back.
_RETRY_CONFIG: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_DISCARD_TIMEOUT_S = 5.0
_SWEEP_INTERVAL_S = 60.0
# Pictures are written a while before their job ends: Redis may be away, or the job's other pictures be tried again.
_SWEEP_MARGIN_S = 300.0
_MAX_SWEPT_JOBS = 10_000


class ResultStore:
    """Where `settings.result_store` says. Raises `ConfigError` when that cannot be used; talks to no server yet."""

    def __init__(self, settings: Settings, url: str) -> None:
        try:
            import obstore.exceptions
            from obstore.store import GCSStore, LocalStore, S3Store
        except ImportError as error:
            raise ConfigError(
                f"DARKROOM_RESULT_STORE={url}: the package obstore is missing: pip install 'darkroom[store]'"
            ) from error
        self._url = url
        self._shard = settings.shard
        self._timeout_s = settings.result_store_timeout_s
        self._swept_after_s = settings.result_ttl_s + _SWEEP_MARGIN_S
        self._next_sweep = 0.0
        self._errors = (obstore.exceptions.BaseError, OSError)
        self._refusals = (
            obstore.exceptions.PermissionDeniedError,
            obstore.exceptions.UnauthenticatedError,
            FileNotFoundError,
        )
        self._directory: Path | None = None
        self._store: LocalStore | S3Store | GCSStore
        self._signer: S3Store | GCSStore | None = None
        try:
            if url.startswith("file:"):
                self._directory = Path(unquote(urlsplit(url).path))
                self._store = LocalStore(self._directory, mkdir=True)
            else:
                _check_endpoint()
                kind = S3Store if url.startswith("s3:") else GCSStore
                self._store = kind.from_url(url, client_options=_CLIENT_OPTIONS, retry_config=_RETRY_CONFIG)
                self._signer = self._store if settings.result_urls == "signed" else None
        except (*self._errors, ValueError) as error:
            raise ConfigError(f"DARKROOM_RESULT_STORE={url}: {_reason(error)}") from error

    async def check(self) -> None:
        """Write a small object and delete it. Raises `ConfigError` when that is refused, as wrong credentials or a
        missing bucket are; an outage may pass and is only logged."""
        probe = f"{self._shard}/{'0' * 26}/0-0.png"
        try:
            with self._observed("put"):
                await self._put(probe, b"")
        except ResultStoreUnavailable as error:
            cause = error.__cause__
            if self._directory is not None or isinstance(cause, self._refusals):
                raise ConfigError(f"DARKROOM_RESULT_STORE={self._url}: cannot write: {_reason(cause)}") from cause
            return
        await self._delete([probe])

    async def store(self, job: Job, result: Result, images: Sequence[bytes]) -> Result:
        """Write the pictures of one attempt and return the manifest that says where they lie.

        An outage is waited out for `result_store_timeout_s`. Raises `ResultStoreUnavailable` after that, and removes
        what was written as far as it can.
        """
        place = f"{self._shard}/{job.id}/{job.attempt}-{secrets.token_hex(4)}"
        located = msgspec.structs.replace(result, location=place)
        contents = dict(zip(_keys(located), images, strict=True))
        try:
            async with asyncio.timeout(self._timeout_s), asyncio.TaskGroup() as group:
                for key, content in contents.items():
                    group.create_task(self._put_patiently(key, content))
        except TimeoutError as error:
            await self.discard(located)
            raise ResultStoreUnavailable("the pictures could not be stored: the result store is unavailable") from error
        return located

    async def discard(self, result: Result) -> None:
        """Remove the pictures of an attempt that does not count, as far as the store allows. Raises nothing: what is
        left ends with the bucket's lifecycle rule or `sweep`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_TIMEOUT_S):
                await self._delete(_keys(result))

    async def fetch(self, result: Result, index: int) -> bytes | None:
        """The bytes of a picture, None when the store has it no more. Raises `ResultStoreUnavailable`."""
        key = _keys(result)[index]
        with self._observed("get"):
            try:
                return (await (await self._store.get_async(key)).bytes_async()).to_bytes()
            except FileNotFoundError:
                # A lifecycle rule that is too quick, or another bucket than the workers'.
                log.warning("picture_missing", key=key)
                return None

    @property
    def signs_urls(self) -> bool:
        return self._signer is not None

    async def signed_url(self, result: Result, index: int, lifetime_s: float) -> str | None:
        """A URL that hands the picture to anybody for `lifetime_s`; None when this store gives out none. Raises
        `ResultStoreUnavailable`."""
        if self._signer is None:
            return None
        from obstore import sign_async

        # Whole seconds, and none is no lifetime.
        expires_in = timedelta(seconds=max(1, int(lifetime_s)))
        with self._observed("sign"):
            return await sign_async(self._signer, "GET", _keys(result)[index], expires_in)

    async def sweep(self) -> None:
        """Remove expired pictures from a directory, at most once a minute and a bounded number at a time. A bucket has
        its lifecycle rule."""
        if self._directory is None or time.monotonic() < self._next_sweep:
            return
        self._next_sweep = time.monotonic() + _SWEEP_INTERVAL_S
        try:
            removed = await asyncio.to_thread(_sweep, self._directory / self._shard, self._swept_after_s)
        except OSError as error:
            log.warning("result_store_not_swept", error=str(error))
            return
        if removed:
            log.info("result_store_swept", jobs=removed)

    async def _put_patiently(self, key: str, content: bytes) -> None:
        for attempt in itertools.count():
            try:
                with self._observed("put"):
                    await self._put(key, content)
                return
            except ResultStoreUnavailable:
                await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt) * random.uniform(0.8, 1.2))

    async def _put(self, key: str, content: bytes) -> None:
        attributes: dict[str, str] | None = None
        if self._directory is None:  # a file has none
            attributes = {
                "Content-Type": f"image/{key.rpartition('.')[2]}",
                "Content-Disposition": "inline",
                "Cache-Control": "private, max-age=31536000, immutable",
            }
        # In one piece: a picture is there whole or not at all.
        await self._store.put_async(key, content, attributes=attributes, use_multipart=False)

    async def _delete(self, keys: Sequence[str]) -> None:
        async def delete(key: str) -> None:
            missing = contextlib.suppress(FileNotFoundError)
            with contextlib.suppress(ResultStoreUnavailable), self._observed("delete"), missing:
                await self._store.delete_async(key)

        await asyncio.gather(*map(delete, keys))

    @contextlib.contextmanager
    def _observed(self, operation: str) -> Iterator[None]:
        """Time a call and turn whatever the library raises into `ResultStoreUnavailable`, with a safe sentence."""
        began = time.perf_counter()
        try:
            yield
        except self._errors as error:
            metrics.RESULT_STORE_ERRORS.labels(operation).inc()
            log.warning("result_store_unavailable", operation=operation, reason=_reason(error))
            raise ResultStoreUnavailable("the result store is unavailable") from error
        finally:
            metrics.RESULT_STORE_SECONDS.labels(operation).observe(time.perf_counter() - began)


def _check_endpoint() -> None:
    """Raise `ConfigError` for an endpoint at which the library would panic with every call."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        endpoint = os.environ.get(name)
        if endpoint is not None and re.match(r"https?://[^/]", endpoint) is None:
            raise ConfigError(f"{name}={shorten(endpoint)}: expected https://host or http://host:port")


def _keys(result: Result) -> list[str]:
    """The key of each picture. Raises `JobError` (bad_message) when the record holds anything but our own."""
    keys = [f"{result.location}-{image.index}.{image.format}" for image in result.images]
    if not all(map(_KEY.fullmatch, keys)):
        raise JobError("the stored Result cannot be read", code="bad_message")
    return keys


def _reason(error: BaseException | None) -> str:
    """The library's message without its debug print, which follows in lines of its own."""
    return shorten(str(error).partition("\n\nDebug source")[0], 500)


def _sweep(directory: Path, older_than_s: float) -> int:
    """Remove the folders of jobs in which nothing was written for that long; whatever else lies there stays."""
    written_before = time.time() - older_than_s
    removed = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if removed == _MAX_SWEPT_JOBS:
                break
            # Another process may sweep too, or write here at this very moment.
            with contextlib.suppress(OSError):
                if _JOB_ID.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < written_before:
                    for name in os.listdir(entry.path):
                        if _FILE.fullmatch(name):
                            os.unlink(os.path.join(entry.path, name))
                    os.rmdir(entry.path)
                    removed += 1
    return removed
