"""Three ways to batch, on one engine: by the step (ours), by the request, one by one.

Both rivals are kinder to their requests than servers of their kind: a member that is done leaves at once, so that
nobody waits for the longest, and its rows are no longer computed.
"""

from __future__ import annotations

from collections.abc import Iterable

from darkroom.engine.batcher import Batcher, Candidate, Choice


class RequestLevelBatcher(Batcher):
    """A batch is formed from what waits, in order of arrival, and runs to the end of its longest member."""

    def __init__(self, buckets: Iterable[int], *, max_members: int | None = None) -> None:
        super().__init__(tuple(buckets))
        self._max_members = max_members
        self._members: set[int] = set()

    def choose(self, candidates: Iterable[Candidate], now_s: float) -> Choice | None:
        waiting = sorted(candidates, key=lambda candidate: candidate.id)
        members = [candidate for candidate in waiting if candidate.id in self._members]
        if not members:
            members = self._form([c for c in waiting if c.key == waiting[0].key])
            self._members = {candidate.id for candidate in members}
        return super().choose(members, now_s)

    def _form(self, waiting: list[Candidate]) -> list[Candidate]:
        members: list[Candidate] = []
        for candidate in waiting:
            rows = candidate.model_rows + sum(member.model_rows for member in members)
            if rows > self.max_model_rows or len(members) == self._max_members:
                break
            members.append(candidate)
        return members


class SerialBatcher(RequestLevelBatcher):
    """One row at a time, in order of arrival."""

    def __init__(self, buckets: Iterable[int]) -> None:
        super().__init__(buckets, max_members=1)


POLICIES = {"step": Batcher, "request": RequestLevelBatcher, "serial": SerialBatcher}
