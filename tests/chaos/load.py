"""Clients that do all that clients do, remember what they were told, and do not give up."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from darkroom.jobs import GenerationRequest

# How long a client tries before its request counts as failed.
PATIENCE_S = 180.0
# Ends that a waiting client learns as an error with one of these codes.
END_OF_CODE = {"cancelled": "cancelled", "expired": "expired", "dead_letter": "failed"}
STYLES = {"wait": 4, "poll": 4, "events": 2, "cancel": 2, "deadline": 2, "leave": 1}
NUM_BODIES = 16
# As many words as a text encoder reads, and more: what comes after them is stored with the job and changes no picture.
_UNREAD = "blurred " * 80


def make_bodies(dice: random.Random) -> list[dict[str, Any]]:
    """Requests to choose from, each with its own seed, so that a job's seed tells which picture it must give."""
    return [
        {
            "prompt": f"the red cat {index}",
            "seed": 1000 * (index + 1),
            "num_inference_steps": dice.randint(8, 40),
            "num_images_per_prompt": dice.choice((1, 1, 1, 2)),
            "guidance_scale": dice.choice((1.0, 3.0)),
            "sampler": dice.choice(("euler", "euler_a", "dpmpp_2m", "unipc", "heun", "ddim")),
            "sigma_schedule": "simple",
        }
        for index in range(NUM_BODIES)
    ]


def named(body: dict[str, Any], name: str) -> dict[str, Any]:
    """The request, to be recognised in the job that is stored for it, whether or not anyone is told that job's id."""
    return {**body, "negative_prompt": _UNREAD + name}


def name_of(request: GenerationRequest) -> str:
    """Which request of a client a stored one is; '' for one without a name."""
    return request.negative_prompt.removeprefix(_UNREAD)


@dataclass
class Book:
    """What clients have asked for and what they were told: job ids by request, and the end of each job. The jobs of
    those that are `waited_for` may be given up, and their keys back, when nobody has waited for long enough."""

    ids_of: dict[str, set[str]] = field(default_factory=dict)
    waited_for: set[str] = field(default_factory=set)
    ends: dict[str, set[str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    retries: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    num_refused: int = 0

    @property
    def job_ids(self) -> set[str]:
        return set().union(*self.ids_of.values())

    def ask(self, name: str, *, is_waited_for: bool) -> None:
        self.ids_of.setdefault(name, set())
        if is_waited_for:
            self.waited_for.add(name)

    def note(self, key: str, job_id: str, end: str | None = None) -> None:
        self.ids_of[key].add(job_id)
        if end is not None:
            self.ends.setdefault(job_id, set()).add(end)


class Failed(Exception):
    """A request that got no answer, or a wrong one."""


class Refused(Exception):
    """A request whose deadline, as the server said, cannot be met."""


class Client:
    """One client, with dice of its own. `urls` gives the servers that a load balancer would choose from. Its requests
    carry their names, which are also their Idempotency-Keys, unless `is_naming` is false."""

    def __init__(
        self,
        name: str,
        dice: random.Random,
        urls: Callable[[], Sequence[str]],
        bodies: Sequence[dict[str, Any]],
        book: Book,
        *,
        is_naming: bool = True,
    ) -> None:
        self._name, self._dice, self._urls, self._bodies, self._book = name, dice, urls, bodies, book
        self._is_naming = is_naming
        self._num_asked = 0
        self._http = httpx.AsyncClient(timeout=20, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))

    async def run(self, stop: asyncio.Event, pause_s: float) -> None:
        """Ask for one thing after the other until `stop`."""
        async with self._http:
            while not stop.is_set():
                style = self._dice.choices(list(STYLES), list(STYLES.values()))[0]
                await self.ask(style)
                await asyncio.sleep(self._dice.uniform(0, 2 * pause_s))

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(self, style: str) -> None:
        self._num_asked += 1
        self._book.num_requests += 1
        key = f"{self._name}-{self._num_asked}"
        body = {**self._dice.choice(self._bodies), "priority": self._dice.choice(("low", "normal", "normal", "high"))}
        try:
            if style == "leave":
                await self._leave(key, body)
                return
            if style == "deadline":
                body["deadline_s"] = round(self._dice.uniform(0.2, 3.0), 2)
            is_waiting = style in ("wait", "deadline")
            job_id, end = await self._submit(key, {**body, "mode": "wait" if is_waiting else "async"})
            if style == "cancel":
                await asyncio.sleep(self._dice.uniform(0, 1.0))
                await self._call("DELETE", f"/jobs/{job_id}")
            if style == "events":
                await self._follow(job_id)
            if end is None:
                end = await self._poll(job_id)
            self._book.note(key, job_id, end)
            if end == "succeeded":
                reply = await self._call("GET", f"/jobs/{job_id}/images/0")
                if reply.status_code != 200:
                    raise Failed(f"picture: {reply.status_code} {reply.text[:200]}")
        except Refused:
            self._book.num_refused += 1
        except Failed as error:
            self._book.failed.append(f"{key} ({style}): {error}")

    async def _submit(self, key: str, body: dict[str, Any]) -> tuple[str, str | None]:
        """The job's id, and its end if the reply tells it."""
        self._book.ask(key, is_waited_for=body["mode"] == "wait")
        reply = await self._call("POST", "/generate", json=self._named(body, key), headers={"Idempotency-Key": key})
        told = reply.json()
        if told.get("code") == "deadline_unmet" or any(e["field"] == "deadline_s" for e in told.get("errors", ())):
            raise Refused
        job_id = told.get("job_id")
        if job_id is None:
            raise Failed(f"{reply.status_code} {reply.text[:300]}")
        self._book.note(key, job_id)
        if reply.status_code == 200:
            return job_id, "succeeded"
        if reply.status_code == 202:
            return job_id, None
        if told.get("code") not in END_OF_CODE:
            raise Failed(f"{reply.status_code} {reply.text[:300]}")
        return job_id, END_OF_CODE[told["code"]]

    async def _poll(self, job_id: str) -> str:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            reply = await self._call("GET", f"/jobs/{job_id}")
            if reply.status_code != 200:
                raise Failed(f"job {job_id}: {reply.status_code} {reply.text[:200]}")
            state = str(reply.json()["state"])
            if state not in ("queued", "running"):
                return state
            await asyncio.sleep(0.3)
        raise Failed(f"job {job_id} did not end in {PATIENCE_S} s")

    async def _follow(self, job_id: str) -> None:
        """Read the job's events to their end, across as many servers as it takes."""
        last: str | None = None
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            headers = {} if last is None else {"Last-Event-ID": last}
            with contextlib.suppress(httpx.TransportError):
                async with self._http.stream(
                    "GET", f"{await self._url()}/jobs/{job_id}/events", headers=headers
                ) as reply:
                    async for line in reply.aiter_lines():
                        name, _, value = line.partition(": ")
                        if name == "id":
                            last = value
                        if name == "event" and value in ("succeeded", "failed", "cancelled", "expired"):
                            return
            self._book.retries["events"] += 1
            await asyncio.sleep(0.1)

    def _named(self, body: dict[str, Any], name: str) -> dict[str, Any]:
        return named(body, name) if self._is_naming else body

    async def _leave(self, name: str, body: dict[str, Any]) -> None:
        """Wait without a key, and go before the answer comes: asked once, so there is one job of it or none."""
        self._book.ask(name, is_waited_for=False)
        with contextlib.suppress(httpx.TransportError, TimeoutError):
            async with asyncio.timeout(self._dice.uniform(0.05, 0.6)):
                asked = self._named({**body, "mode": "wait"}, name)
                await self._http.post(f"{await self._url()}/generate", json=asked)

    async def _url(self) -> str:
        while not (urls := self._urls()):  # noqa: ASYNC110 - servers come and go by themselves
            await asyncio.sleep(0.05)
        return self._dice.choice(urls)

    async def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Call until a server answers. Every call is harmless to repeat: a POST has its Idempotency-Key."""
        until = time.monotonic() + PATIENCE_S
        last = "no server"
        while time.monotonic() < until:
            try:
                reply = await self._http.request(method, await self._url() + path, **options)
            except httpx.TransportError as error:
                last = type(error).__name__
                self._book.retries[last] += 1
                await asyncio.sleep(0.05)
                continue
            last = str(reply.json().get("code")) if reply.status_code in (429, 503) else ""
            if last in ("", "deadline_unmet"):
                return reply
            self._book.retries[last] += 1
            # Another server will answer where one drains.
            wait_s = 0.0 if last == "draining" else float(reply.headers.get("retry-after", 1))
            await asyncio.sleep(min(wait_s, 0.5))
        raise Failed(f"{method} {path.partition('?')[0]}: no answer in {PATIENCE_S} s, last {last}")
