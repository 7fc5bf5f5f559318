"""Which rows take the next tick together. Plain Python: no torch, no clock of its own.

Rows may share a tick only when their `BatchKey` is equal. Keys share the machine's time by stride scheduling, so no
image size blocks another. Within a key the order is priority class, then deadline slack, then the time that remains
less the time a row has been here, and a row that has waited long climbs one class after another: nobody starves.
Tenants take turns: where not all rows find room, the first of each goes before the second of any.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchKey:
    """What must be equal for rows to share one UNet call. `height`, `width` in latent pixels; `text_chunks` is the
    length of the longer of a row's texts, as often as the text encoder takes it in one go; `is_wide` rows overflowed
    once and are begun again in fp32.
    """

    model: str
    height: int
    width: int
    text_chunks: int = 1
    adapters: tuple[str, ...] = ()
    is_wide: bool = False


@dataclass
class Candidate:
    """A row as the batcher sees it.

    `model_rows` is 2 with guidance, else 1; `rank` 0..2 is the priority class; `remaining` counts UNet evaluations.
    `deadline_s`, `waiting_since_s` (when the row last ran or joined) and `joined_s` are on the caller's clock. A worker
    was lost with a row that `is_redelivered`: perhaps because of it, so it shares ticks only with its like. `tenant` is
    whose job it is.
    """

    id: int
    key: BatchKey
    model_rows: int
    rank: int
    remaining: int
    waiting_since_s: float
    deadline_s: float | None = None
    joined_s: float = 0.0
    is_redelivered: bool = False
    tenant: str = "default"


@dataclass(frozen=True)
class Choice:
    """The rows of one tick: `ids` in order, `model_rows` in use, padded up to `bucket`."""

    key: BatchKey
    ids: tuple[int, ...]
    model_rows: int
    bucket: int


class Batcher:
    """Chooses rows tick by tick.

    `buckets` are the model-row counts that a tick may have, ascending; `ageing_s` is the wait that lifts a row by one
    class. Raises `ValueError` when there is no bucket or the largest cannot hold one guided row.
    """

    def __init__(self, buckets: Sequence[int], *, ageing_s: float = 5.0) -> None:
        self.buckets = tuple(sorted(set(buckets)))
        if not self.buckets or self.buckets[-1] < 2:
            raise ValueError(f"row buckets: got {tuple(buckets)}, expected at least one of 2 or more model rows")
        self.ageing_s = ageing_s
        self._virtual_s: dict[BatchKey, float] = {}
        self._floor_s = 0.0
        self._evaluation_s: dict[BatchKey, float] = {}
        self._most: dict[BatchKey, int] = {}

    @property
    def max_model_rows(self) -> int:
        return self.buckets[-1]

    def choose(self, candidates: Iterable[Candidate], now_s: float) -> Choice | None:
        """Choose the next tick's rows, or None when there are none."""
        by_key: dict[BatchKey, list[Candidate]] = {}
        for candidate in candidates:
            by_key.setdefault(candidate.key, []).append(candidate)
        if not by_key:
            return None
        key = self._next_key(by_key, now_s)
        ids: list[int] = []
        model_rows = 0
        ordered = _in_turns(sorted(by_key[key], key=lambda c: self._urgency(c, now_s)))
        for candidate in ordered:
            if candidate.is_redelivered != ordered[0].is_redelivered:
                continue
            # A single row always fits, whatever the limit.
            if not ids or model_rows + candidate.model_rows <= self._most.get(key, self.max_model_rows):
                ids.append(candidate.id)
                model_rows += candidate.model_rows
        bucket = next(bucket for bucket in self.buckets if bucket >= model_rows)
        return Choice(key, tuple(ids), model_rows, bucket)

    def halve(self, key: BatchKey, bucket: int) -> int | None:
        """After a tick of `bucket` found no memory: let rows of `key` share ticks of half as many model rows at most.

        Returns the new limit, None where no bucket is as small.
        """
        smaller = [other for other in self.buckets if other <= bucket // 2]
        if not smaller:
            return None
        self._most[key] = smaller[-1]
        return smaller[-1]

    def account(self, key: BatchKey, tick_s: float, rank: int) -> None:
        """Charge a tick of `tick_s` seconds, whose most urgent row had class `rank`, to its key."""
        self._virtual_s[key] = self._virtual_s.get(key, 0.0) + tick_s / 4.0**rank
        known = self._evaluation_s.get(key)
        self._evaluation_s[key] = tick_s if known is None else 0.9 * known + 0.1 * tick_s

    def _next_key(self, by_key: dict[BatchKey, list[Candidate]], now_s: float) -> BatchKey:
        """Least virtual time first; a key that was idle starts level with the others instead of with a credit."""
        active = [self._virtual_s[key] for key in by_key if key in self._virtual_s]
        floor = self._floor_s = max(self._floor_s, min(active, default=0.0))
        # A key that left in debt keeps the debt until the others have caught up.
        owed = {key: virtual_s for key, virtual_s in self._virtual_s.items() if virtual_s > floor}
        self._virtual_s = owed | {key: max(floor, owed.get(key, floor)) for key in by_key}
        self._evaluation_s = {key: s for key, s in self._evaluation_s.items() if key in by_key}
        return min(
            by_key,
            key=lambda key: (self._virtual_s[key], min(self._urgency(candidate, now_s) for candidate in by_key[key])),
        )

    def _urgency(self, candidate: Candidate, now_s: float) -> tuple[int, float, float, int, int]:
        """Sort key, most urgent first."""
        waited_s = max(0.0, now_s - candidate.waiting_since_s)
        rank = candidate.rank + int(waited_s / self.ageing_s)
        remaining_s = candidate.remaining * self._evaluation_s.get(candidate.key, 0.0)
        slack_s = math.inf
        if candidate.deadline_s is not None:
            slack_s = candidate.deadline_s - now_s - remaining_s
        # Shortest remaining first keeps the mean low, first come first served the tail: a second here counts as much as
        # a second to go.
        here_s = now_s - candidate.joined_s
        return (-rank, slack_s, remaining_s - here_s, candidate.remaining, candidate.id)


def _in_turns(ordered: Sequence[Candidate]) -> list[Candidate]:
    """Rows in order of the model rows that their own tenant has before them, which changes nothing for one tenant."""
    before: dict[str, int] = defaultdict(int)
    turns = []
    for candidate in ordered:
        turns.append(before[candidate.tenant])
        before[candidate.tenant] += candidate.model_rows
    return [ordered[i] for i in sorted(range(len(ordered)), key=turns.__getitem__)]


def row_buckets(max_rows: int, *, is_reproducible: bool, reproducible_rows: int, has_graphs: bool) -> tuple[int, ...]:
    """The model-row counts a worker's ticks may have.

    Reproducible mode has one. With captured graphs each count costs memory, so they double; without, padding would
    only cost time, so small counts are exact and larger ones go by fours.
    """
    if is_reproducible:
        return (reproducible_rows,)
    if has_graphs:
        return (*(2**i for i in range(max_rows.bit_length()) if 2**i < max_rows), max_rows)
    return (*(n for n in range(1, max_rows) if n <= 8 or n % 4 == 0), max_rows)
