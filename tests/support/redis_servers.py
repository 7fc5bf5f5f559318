"""Redis servers of a test's own, with whatever settings it wants: to be killed, wiped, promoted and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from darkroom.queue.embedded import find_redis_server
from redis import Redis
from redis.exceptions import RedisError

_START_S = 10.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def eventually(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, "it never became true"
        await asyncio.sleep(0.02)


class RedisServer:
    """A redis-server on a TCP port of 127.0.0.1 with its data in `directory`. Options are Redis's own, with underscores
    for dashes; without any, nothing is written to disk."""

    def __init__(self, directory: Path, **options: str | int) -> None:
        self.directory = directory
        self.port = free_port()
        self._options: dict[str, str | int] = {
            "save": "",
            "appendonly": "no",
            "repl_diskless_sync_delay": 0,
            **options,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def log(self) -> str:
        return (self.directory / "redis.log").read_text()

    def client(self) -> Any:
        return Redis(port=self.port, protocol=2, retry=None, decode_responses=True)

    def start(self, *, until: str = "it answers", **options: str | int) -> None:
        """Start on the same port and data, with other options if they are given. Returns once it answers a ping, or
        with `until="it listens"` as soon as it takes connections."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._options |= options
        settings = {"port": self.port, "bind": "127.0.0.1", "dir": str(self.directory), **self._options}
        arguments = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        with (self.directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([find_redis_server(), *arguments], stdout=log, stderr=log)
        ends_at = time.monotonic() + _START_S
        while not (self.listens() if until == "it listens" else self.answers()):
            assert self._process.poll() is None, self.log
            assert time.monotonic() < ends_at, self.log
            time.sleep(0.01)

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(self.address) == 0

    def answers(self) -> bool:
        with self.client() as redis, contextlib.suppress(RedisError, OSError):
            return bool(redis.ping())
        return False

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """kill -9."""
        self._signal(signal.SIGKILL)

    def end(self) -> None:
        """An orderly end: the server saves what it is told to save."""
        self._signal(signal.SIGTERM)

    def stop_answering(self) -> None:
        self._kill(signal.SIGSTOP)

    def answer_again(self) -> None:
        self._kill(signal.SIGCONT)

    def follow(self, master: RedisServer) -> None:
        """Become a replica of `master`, and return when it is in step."""
        with self.client() as redis:
            redis.replicaof(*master.address)
        ends_at = time.monotonic() + _START_S
        while not self.is_in_step_with(master):
            assert time.monotonic() < ends_at, self.log
            time.sleep(0.02)

    def promote(self) -> None:
        with self.client() as redis:
            redis.replicaof("NO", "ONE")

    def is_replica_of(self, master: RedisServer) -> bool:
        with self.client() as redis, contextlib.suppress(RedisError):
            info = redis.info("replication")
            return info.get("master_port") == master.port and info.get("master_link_status") == "up"
        return False

    def is_in_step_with(self, master: RedisServer) -> bool:
        with master.client() as redis:
            info = redis.info("replication")
            replica = next((info[f"slave{n}"] for n in range(info["connected_slaves"])), None)
        return bool(replica and replica["state"] == "online" and replica["offset"] >= info["master_repl_offset"])

    def _kill(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.send_signal(number)
        self._process.wait(20)


@contextlib.contextmanager
def sentinels(directory: Path, master: RedisServer, *, count: int) -> Iterator[list[int]]:
    """Real sentinels that watch `master` as the service `jobs` and agree by majority; yields their ports."""
    with contextlib.ExitStack() as stack:
        ports = [free_port() for _ in range(count)]
        for port in ports:
            own = directory / str(port)
            own.mkdir(parents=True)
            config = own / "sentinel.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {own}\n"
                f"sentinel monitor jobs 127.0.0.1 {master.port} {count // 2 + 1}\n"
                "sentinel down-after-milliseconds jobs 500\nsentinel failover-timeout jobs 3000\n"
            )
            with (own / "sentinel.log").open("wb") as log:
                process = subprocess.Popen([find_redis_server(), str(config), "--sentinel"], stdout=log, stderr=log)
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
        ends_at = time.monotonic() + _START_S
        while not all(_knows(port, num_others=count - 1) for port in ports):
            assert time.monotonic() < ends_at, "the sentinels do not find each other"
            time.sleep(0.05)
        yield ports


def _knows(port: int, *, num_others: int) -> bool:
    redis = Redis(port=port, protocol=2, retry=None, decode_responses=True)
    with redis, contextlib.suppress(RedisError, OSError):
        state = redis.sentinel_masters()["jobs"]
        return bool(state["num-other-sentinels"] == num_others and state["num-slaves"] == 1)
    return False
