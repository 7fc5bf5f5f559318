"""A whole Darkroom of real processes: one redis-server that syncs every write, APIs and workers that can be killed, and
a breakable link from each of them to Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx
from darkroom.config import Settings
from darkroom.queue import EmbeddedRedis, JobQueue

from tests.chaos.link import Link
from tests.chaos.load import Book
from tests.chaos.nursery import Child
from tests.chaos.verdict import Verdict, come_to_rest, judge, wait_until

Kind = Literal["api", "worker"]
MODEL_ID = "tiny"
# Bit-equal pictures in any crowd; a lease and checkpoints that fit jobs of a second.
SETTINGS: dict[str, Any] = {
    "lease_s": 1.5,
    "checkpoint_interval_s": 0.3,
    "batching": "reproducible",
    "reproducible_rows": 4,
    "num_threads": 1,
    "encode_threads": 1,
    "result_ttl_s": 7200,
    "job_ttl_s": 7200,
    "max_queue_jobs": 2000,
}
START_S = 60.0


def write_model(directory: Path) -> Path:
    """The smallest model there is, with a card that makes it draw 64 px."""
    # It imports diffusers, which takes seconds.
    from tests.support.tiny_models import write_tiny_model

    write_tiny_model(directory, "sd1", seed=5)
    card = {"id": MODEL_ID, "num_inference_steps": 10, "width": 64, "height": 64, "guidance_scale": 3.0}
    (directory / "darkroom.json").write_text(json.dumps(card))
    return directory


@dataclass
class Member:
    """One process of the stack: its way to Redis and what it has logged."""

    name: str
    kind: Kind
    child: Child
    link: Link
    log: Path
    state: str = "starting"
    lines: list[dict[str, Any]] = field(default_factory=list)
    _read_to: int = 0

    def events(self, name: str, **fields: object) -> list[dict[str, Any]]:
        """Its log lines of that event with those values."""
        with self.log.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                with contextlib.suppress(ValueError):
                    self.lines.append(json.loads(line))
        return [
            line for line in self.lines if isinstance(line, dict) and line.get("event") == name
            and fields.items() <= line.items()
        ]  # fmt: skip

    async def logged(self, name: str, timeout_s: float = START_S, **fields: object) -> dict[str, Any]:
        """Wait for a log line. Raises `AssertionError` with the end of the log when the process ends before."""

        def found() -> list[dict[str, Any]]:
            events = self.events(name, **fields)
            assert events or self.child.exit_code is None, f"{self.name} ended: {self.log.read_text()[-2000:]}"
            return events

        events: list[dict[str, Any]] = await wait_until(found, timeout_s, f"{name} of {self.name}")
        return events[0]

    @property
    def url(self) -> str:
        """Where an API listens."""
        return str(self.events("api_listening")[0]["url"])

    @property
    def worker_id(self) -> str:
        return str(self.events("worker_ready")[0]["worker"])


class Stack:
    """Use as an async context manager. `queue` is this process's own way to Redis, which never breaks. `members` are
    the processes by name, `started` all that there ever were."""

    def __init__(self, directory: Path, model: Path | None = None, **settings: Any) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.model = model or write_model(directory / "model")
        values = {**SETTINGS, **settings}
        self._env = {f"DARKROOM_{name.upper()}": str(value) for name, value in values.items()}
        self.settings = Settings(data_dir=directory / "data", redis_url=None, **values)
        self.redis = EmbeddedRedis(self.settings)
        self.members: dict[str, Member] = {}
        self.started: list[Member] = []

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.redis.start)
        self.queue = await JobQueue.connect(self.settings, self.redis.url)
        # Traps know a script by its digest, so nobody may need to send its text.
        for text in self.queue._connection._scripts.values():
            await self.queue._connection.command("SCRIPT", "LOAD", text)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for member in self.started:
            if member.child.exit_code is None:
                member.child.signal(signal.SIGKILL)
        for member in self.started:
            await member.child.wait()
            await member.link.close()
        await self.queue.close()
        await asyncio.to_thread(self.redis.stop)

    def script(self, name: str) -> str:
        """The digest by which a command that runs this script is known on a link."""
        return self.queue._connection._shas[name]

    async def start(
        self,
        name: str,
        *,
        link: Link | None = None,
        is_awaited: bool = True,
        prepare: Callable[[], None] | None = None,
        is_fresh: bool = False,
        log: Path | None = None,
        **settings: Any,
    ) -> Member:
        """Start `api-...` or `worker-...` and wait until it serves. A name that was used before is taken over."""
        kind: Kind = "api" if name.startswith("api") else "worker"
        if link is None:
            link = Link(self.redis_socket)
            await link.open()
        env = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}
        env |= self._env | {f"DARKROOM_{key.upper()}": str(value) for key, value in settings.items()}
        env |= {"DARKROOM_REDIS_URL": link.url, "DARKROOM_PROCESS": name, "PYTHONFAULTHANDLER": "1"}
        log = log or self._directory / f"{len(self.started):04}-{name}.log"
        log.touch()
        arguments = ["api", "--port", "0"] if kind == "api" else ["worker", "--model", str(self.model)]
        child = await asyncio.to_thread(Child, arguments, env, log, prepare=prepare, is_fresh=is_fresh)
        member = self.members[name] = Member(name, kind, child, link, log)
        self.started.append(member)
        if is_awaited:
            await self.wait_ready(member)
        return member

    async def wait_ready(self, member: Member) -> None:
        await member.logged("api_listening" if member.kind == "api" else "worker_ready")
        member.state = "up"

    async def kill(self, member: Member) -> None:
        """kill -9, proven by the exit status."""
        member.state = "dead"
        await member.child.kill()
        await member.link.close()

    async def kill_redis(self) -> None:
        """kill -9 of the redis-server, proven by its end, and a new start on the same data."""
        os.kill(self.redis.server_pid, signal.SIGKILL)
        await wait_until(lambda: self.redis.poll() is not None, what="the end of redis-server")
        await asyncio.to_thread(self.redis.restart)

    @property
    def redis_socket(self) -> Path:
        return Path(self.redis._socket_path)

    @contextlib.asynccontextmanager
    async def client(self, member: Member) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=member.url, timeout=30, trust_env=False) as client:
            yield client

    async def verdict(self, accepted: list[str], book: Book | None = None, timeout_s: float = 60.0) -> Verdict:
        """Wait until nothing waits or runs, then judge."""
        await come_to_rest(self.queue, timeout_s)
        return await judge(self.queue, self.settings, accepted, book)
