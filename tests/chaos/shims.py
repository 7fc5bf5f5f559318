"""Faults that are planted in a worker or API process before it runs: what no signal and no network can bring about.

Children import this module alone, so it imports nothing heavy by itself.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

POISON = "poison"


def crash_on_poison() -> None:
    """A tick with a row of a poisonous prompt ends the process, as a bug in a driver would."""
    from darkroom.engine.engine import Engine

    tick = Engine._tick

    def crash(self: Engine, choice: Any, joined: int) -> None:
        if any(POISON in self._rows[id_].active.job.request.prompt for id_ in choice.ids):
            os.kill(os.getpid(), signal.SIGKILL)
        tick(self, choice, joined)

    Engine._tick = crash  # type: ignore[method-assign]


def lose_the_device() -> None:
    """The fifth tick with rows of jobs takes the device along, as an illegal access on a GPU does."""
    from darkroom.engine.device import TickDevice
    from darkroom.engine.engine import Engine

    tick, ticks = Engine._tick, 0

    def lose(self: Engine, choice: Any, joined: int) -> None:
        nonlocal ticks
        ticks += self._rows[choice.ids[0]].active.job.id != "warm-up"
        if ticks == 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        tick(self, choice, joined)

    Engine._tick = lose  # type: ignore[method-assign]
    TickDevice.is_lost = lambda self, error: "illegal memory access" in str(error)  # type: ignore[method-assign]


def ticks_file(log: Path) -> Path:
    """Where `write_down_ticks` writes, by where the process logs."""
    return log.with_suffix(".ticks")


def write_down_ticks() -> None:
    """Each step of each image becomes a line in a file beside the log, which a kill leaves there: when it began and
    ended, of which job, attempt and image, and how many steps are done with it. No fault; it tells what one has cost.
    """
    from darkroom.engine.engine import Engine

    file = os.open(ticks_file(Path(os.readlink("/proc/self/fd/1"))), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    complete = Engine._complete

    def noted(self: Engine) -> None:
        flight = self._in_flight[0]
        complete(self)
        times = f"{flight.started_s:.6f} {time.monotonic():.6f}"
        for row in flight.tick.rows:
            job = row.active.job
            os.write(file, f"{times} {job.id} {job.attempt} {row.index} {row.num_done}\n".encode())

    Engine._complete = noted  # type: ignore[method-assign]


def hang_while_loading() -> None:
    """The model never comes."""
    from darkroom.worker import main

    def hang(*_: object, **__: object) -> Any:
        print('{"event": "loading"}', flush=True)
        time.sleep(600)

    main.load_model = hang


def hang_while_warming_up() -> None:
    """The first picture for nobody never ends."""
    from darkroom.engine.engine import Engine

    def hang(*_: object) -> None:
        print('{"event": "warming_up"}', flush=True)
        time.sleep(600)

    Engine._draw_for_nobody = hang  # type: ignore[method-assign]


def one_hour_ahead() -> None:
    _shift_clock(3600.0)


def one_hour_behind() -> None:
    _shift_clock(-3600.0)


def _shift_clock(seconds: float) -> None:
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)
