"""Keep child processes running, stop them in order, and never leave one behind.

A service that ends by itself is started again after 1 s, doubling to 30 s, and after 1 s again once it has run for a
minute. Stopping goes through the services in the order of `Service.stop_rank`. Children live in sessions of their own,
so a terminal's Ctrl-C reaches only the parent; they call `die_with_parent`, so that even a killed parent takes them
along.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from darkroom.errors import ConfigError, DarkroomError, ModelError

log = structlog.get_logger("darkroom.supervisor")

EXIT_FAILED = 1
EXIT_CONFIG = 2
PARENT_VARIABLE = "DARKROOM_PARENT"
_PR_SET_PDEATHSIG = 1


class Process(Protocol):
    """A running child, as `asyncio.subprocess.Process` is one."""

    async def wait(self) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Service:
    """Something to keep running.

    `start` begins one life of it and returns once its process exists. Services with a low `stop_rank` are stopped
    first; one that has not ended `stop_timeout_s` after SIGTERM is killed.
    """

    name: str
    start: Callable[[], Awaitable[Process]]
    stop_rank: int = 0
    stop_timeout_s: float = 1.5


@dataclass(frozen=True)
class Backoff:
    """Seconds between a service's end and its next start."""

    first_s: float = 1.0
    longest_s: float = 30.0
    healthy_s: float = 60.0


class Supervisor:
    """Runs services until `stop`.

    Until `settle` is called, a service that refuses its configuration (exit code 2, or a `ConfigError` or `ModelError`
    of its `start`) ends the whole: `run` returns 2. Afterwards it is restarted like any other, because the parent's
    other children still serve.
    """

    def __init__(self, backoff: Backoff | None = None) -> None:
        self._backoff = backoff or Backoff()
        self._services: list[_Kept] = []
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._is_settled = False
        self._exit_code = 0
        self._refusal: DarkroomError | None = None

    def handle_signals(self) -> None:
        """Let SIGINT, SIGTERM and SIGHUP stop everything; a second one kills what is left at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            loop.add_signal_handler(signal.SIGHUP, self.stop)

    def add(self, service: Service) -> None:
        """Start a service and keep it running."""
        kept = _Kept(service)
        kept.task = asyncio.ensure_future(self._keep(kept))
        kept.task.add_done_callback(self._stop_on_error)
        self._services.append(kept)

    def settle(self) -> None:
        """Everything has been ready once: from now on nothing ends the whole but `stop`."""
        self._is_settled = True

    def stop(self) -> None:
        """Ask for an orderly end; asked twice, for a quick one."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def _decides_the_start(self) -> bool:
        return not self._is_settled and not self._stop.is_set()

    async def wait_stop(self, timeout_s: float | None = None) -> bool:
        """Sleep, but not past a stop. Returns whether one was asked for."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), timeout_s)
        return self._stop.is_set()

    async def run(self) -> int:
        """Wait for a stop, end every service in order, and return the exit code.

        Raises the `ConfigError` or `ModelError` that a service's `start` was refused with.
        """
        await self._stop.wait()
        errors: list[BaseException] = []
        for rank in sorted({kept.service.stop_rank for kept in self._services}):
            ending = [kept for kept in self._services if kept.service.stop_rank == rank]
            for kept in ending:
                kept.stop.set()
            ends = await asyncio.gather(*(kept.task for kept in ending if kept.task), return_exceptions=True)
            errors += [end for end in ends if isinstance(end, BaseException)]
        for error in errors:
            raise error
        if self._refusal is not None:
            raise self._refusal
        return self._exit_code

    def _stop_on_error(self, task: asyncio.Future[None]) -> None:
        """A fault of the parent's own: `run` raises it once everything has ended."""
        if not task.cancelled() and task.exception() is not None:
            self.stop()

    async def _keep(self, kept: _Kept) -> None:
        service, delay_s = kept.service, self._backoff.first_s
        while not kept.stop.is_set():
            started = time.monotonic()
            reason = await self._live_once(kept)
            if self._stop.is_set():
                # Its turn to be stopped has not come, but nothing will be started any more.
                return
            if time.monotonic() - started >= self._backoff.healthy_s:
                delay_s = self._backoff.first_s
            log.error("service_ended", service=service.name, reason=reason, restart_in_s=delay_s)
            if await self.wait_stop(delay_s):
                return
            delay_s = min(2 * delay_s, self._backoff.longest_s)

    async def _live_once(self, kept: _Kept) -> str:
        """One life of a service, from start to end. Returns why it ended."""
        try:
            process = await kept.service.start()
        except DarkroomError as error:
            if isinstance(error, (ConfigError, ModelError)) and self._decides_the_start:
                self._refusal = error
                self.stop()
            return str(error)
        ended = asyncio.ensure_future(process.wait())
        await first_of(ended, kept.stop.wait())
        if not ended.done():
            await self._end(process, ended, kept.service)
        code = await ended
        if code == EXIT_CONFIG and self._decides_the_start:
            self._exit_code = EXIT_CONFIG
            self.stop()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def _end(self, process: Process, ended: asyncio.Future[int], service: Service) -> None:
        with suppress(ProcessLookupError):
            process.terminate()
        await first_of(ended, self._hurry.wait(), timeout_s=service.stop_timeout_s)
        if not ended.done():
            log.warning("service_killed", service=service.name, stop_timeout_s=service.stop_timeout_s)
            with suppress(ProcessLookupError):
                process.kill()


class _Kept:
    """A service, the task that keeps it and the order to end it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.stop = asyncio.Event()
        self.task: asyncio.Future[None] | None = None


async def first_of(future: asyncio.Future[Any], other: Awaitable[object], *, timeout_s: float | None = None) -> None:
    """Wait for either, or for the time; leaves `future` alone and cancels `other`."""
    waiting = asyncio.ensure_future(other)
    both: set[asyncio.Future[Any]] = {future, waiting}
    await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


class Spawner:
    """Starts children that end with this process.

    The kernel's parent-death signal follows the thread that spawned the child, so spawn from the main thread's loop.
    """

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()

    async def spawn(self, argv: Sequence[str], env: Mapping[str, str]) -> asyncio.subprocess.Process:
        """Run `argv` with its output on this process's stderr and nothing on its stdin."""
        return await asyncio.create_subprocess_exec(
            *argv,
            env={**env, PARENT_VARIABLE: f"{os.getpid()}:{self._read_end}"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,
            pass_fds=(self._read_end,),
            start_new_session=True,
        )

    def close(self) -> None:
        """Let go of the pipe; children that still live end."""
        os.close(self._write_end)
        os.close(self._read_end)


def die_with_parent() -> None:
    """In a child of `Spawner`: end this process, without ceremony, when its parent ends. Elsewhere: do nothing.

    Linux delivers the signal itself; the pipe, whose other end only the parent holds, serves every other system and the
    moments before.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    pid, _, descriptor = parent.partition(":")
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(pid):
        os._exit(EXIT_FAILED)
    os.set_inheritable(int(descriptor), False)
    threading.Thread(target=_exit_at_end_of_file, args=(int(descriptor),), name="parent-watch", daemon=True).start()


def _exit_at_end_of_file(descriptor: int) -> None:
    with suppress(OSError):
        os.read(descriptor, 1)
    os._exit(EXIT_FAILED)
