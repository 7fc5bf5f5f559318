"""Starts `darkroom` processes in a tenth of the time: they are forked from one that has imported everything and run
nothing.

What runs is the real command line, in a process of its own that can be killed. The nursery is the standard library's
fork server; when this process ends, however that happens, it ends, and with it every child (Linux tells them).
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

# The modules of both kinds of process, and what they import late: loading a model takes seconds the first time.
PRELOADED = (
    "darkroom.cli",
    "darkroom.api.server",
    "darkroom.worker.main",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "safetensors.torch",
)
_PR_SET_PDEATHSIG = 1

_context = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(list(PRELOADED))


def _live(
    arguments: Sequence[str], env: Mapping[str, str], log: str, prepare: Callable[[], None] | None, is_fresh: bool
) -> None:
    """In the child: become `darkroom ARGUMENTS`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.clear()
    os.environ.update(env)
    if is_fresh:
        os.execve(sys.executable, [sys.executable, "-m", "darkroom", *arguments], dict(env))
    sys.argv = ["darkroom", *arguments]
    if prepare is not None:
        prepare()
    from darkroom.cli import main

    main()


class Child:
    """A running `darkroom` process."""

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        *,
        prepare: Callable[[], None] | None = None,
        is_fresh: bool = False,
    ) -> None:
        """Start it with its output in `log`. `prepare` is called in it before anything else. `is_fresh` starts a new
        interpreter, as a shell would."""
        self._process = _context.Process(target=_live, args=(arguments, env, str(log), prepare, is_fresh), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self._code: int | None = None

    @property
    def exit_code(self) -> int | None:
        """None while it runs, -9 after SIGKILL."""
        return self._process.exitcode if self._code is None else self._code

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def wait(self, timeout_s: float = 20.0) -> int:
        """Wait for its end and return the exit code. Raises `TimeoutError`."""
        if self._code is not None:
            return self._code
        ended, loop, sentinel = asyncio.Event(), asyncio.get_running_loop(), self._process.sentinel
        loop.add_reader(sentinel, ended.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        finally:
            loop.remove_reader(sentinel)
        if self._code is None:
            self._process.join()
            self._code = self._process.exitcode
            self._process.close()
        assert self._code is not None
        return self._code

    async def kill(self) -> None:
        """End it at once, if it has not ended, and see that SIGKILL is what ended it. It may be stopped."""
        self.signal(signal.SIGKILL)
        code = await self.wait()
        assert code == -signal.SIGKILL, f"it ended with {code} before it was killed"
