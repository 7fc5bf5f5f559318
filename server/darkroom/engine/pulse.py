"""Is the engine getting anywhere: how long has what it does now taken, against what that may take.

What may hang on a device (a turn of the tick loop, a decode) runs as a phase of some size. A phase may take three times
what the same size took before, or what follows from other sizes, and never less than `least_s`; one of a kind that was
never measured may take `first_s`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SLACK = 3.0
# A measurement of a slow moment is forgotten within a few hundred phases.
FORGET = 0.99
MAX_SIZES = 4096


@dataclass(frozen=True)
class Phase:
    """Something under way: its kind, when it began and how long it may take, in seconds of the clock."""

    kind: str
    began_s: float
    allowed_s: float


class Pulse:
    """The phases of one engine. Any thread may run or look at them."""

    def __init__(self, least_s: float, *, first_s: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._least_s, self._first_s, self._clock = least_s, first_s, clock
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._running: dict[int, Phase] = {}
        self._by_size: dict[tuple[str, float], float] = {}
        self._seconds_per_size: dict[str, float] = {}

    @contextmanager
    def phase(self, kind: str, size: float) -> Iterator[None]:
        """Run something that takes about `size` times as long as the same kind does at size 1."""
        began_s, id_ = self._clock(), next(self._ids)
        with self._lock:
            self._running[id_] = Phase(kind, began_s, max(self._least_s, self._allowed_s(kind, size)))
        try:
            yield
        finally:
            with self._lock:
                del self._running[id_]
                self._learn(kind, size, self._clock() - began_s)

    def overdue(self) -> Phase | None:
        """A phase that has taken longer than it may, if there is one."""
        now_s = self._clock()
        with self._lock:
            return next((phase for phase in self._running.values() if now_s - phase.began_s > phase.allowed_s), None)

    def _allowed_s(self, kind: str, size: float) -> float:
        known_s = self._by_size.get((kind, size))
        if known_s is None and kind in self._seconds_per_size:
            known_s = self._seconds_per_size[kind] * size
        return self._first_s if known_s is None else SLACK * known_s

    def _learn(self, kind: str, size: float, took_s: float) -> None:
        if len(self._by_size) >= MAX_SIZES:
            self._by_size.clear()
        self._by_size[kind, size] = max(took_s, FORGET * self._by_size.get((kind, size), 0.0))
        if size > 0:
            self._seconds_per_size[kind] = max(took_s / size, FORGET * self._seconds_per_size.get(kind, 0.0))
