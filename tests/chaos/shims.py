"""Faults that are planted in a worker or API process before it runs: what no signal and no network can bring about.

Children import this module alone, so it imports nothing heavy by itself.
"""

from __future__ import annotations

import os
import signal
import time
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
