"""Which rows leave something besides their next evaluation: a state that is made safe, or a preview."""

from __future__ import annotations

from collections.abc import Sequence

from darkroom.config import Settings
from darkroom.engine.previews import Previews
from darkroom.engine.row import Row

# The part of one core's time that previews may take, however many watch, and how much of it may be saved up.
PREVIEW_SHARE = 0.01
PREVIEW_BURST_S = 0.02


class Due:
    """By the intervals of `settings`, and for previews by what they cost as well. Only the ticks' thread may call."""

    def __init__(self, settings: Settings, previews: Previews) -> None:
        self._settings, self._previews = settings, previews
        self._allowance_s, self._asked_s = PREVIEW_BURST_S, 0.0

    def to_save(self, rows: Sequence[Row], now_s: float) -> list[Row]:
        """Rows whose state after the next evaluation is to be made safe."""
        every_s, every_steps = self._settings.checkpoint_interval_s, self._settings.checkpoint_steps
        # What is lost with a worker is no older than the interval, its way to Redis included.
        made_every_s = every_s - self._settings.checkpoint_write_s
        return [
            row
            for row in rows
            if 0 < made_every_s <= now_s - row.saved_s or 0 < every_steps <= row.step_index + 1 - row.saved_step
        ]

    def to_show(self, rows: Sequence[Row], now_s: float) -> list[Row]:
        """Rows that somebody watches and whose next preview is due; a last evaluation is followed by the picture. A
        first preview is made at once; those after it, longest not shown first, only while previews keep to their share.
        """
        every_s, every_steps = self._settings.preview_interval_s, self._settings.preview_steps
        due = [
            row
            for row in rows
            if row.active.previews != "off"
            # All images of a job together keep to the interval.
            and now_s - row.shown_s >= every_s * len(row.active.rows)
            and (row.shown_step == 0 or row.step_index + 1 - row.shown_step >= every_steps)
            and row.step_index + 1 < row.table.num_evaluations
        ]
        if not due:
            return []
        saved_s = PREVIEW_SHARE * (now_s - self._asked_s)
        self._allowance_s = min(PREVIEW_BURST_S, self._allowance_s + saved_s)
        self._asked_s = now_s
        shown = []
        for row in sorted(due, key=lambda row: row.shown_s):
            if row.shown_step == 0 or self._allowance_s >= 0:
                self._allowance_s -= self._previews.cost_s
                shown.append(row)
        return shown
