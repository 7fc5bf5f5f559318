"""The jobs that an engine holds, as any thread may see them: who came, who is to be cancelled, who has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from darkroom.engine.row import ActiveJob, Interval, Row
from darkroom.jobs import Previews


@dataclass(frozen=True)
class News:
    """What came in since the ticks' thread last looked."""

    arrived: list[ActiveJob]
    cancelled: list[ActiveJob]


class Roster:
    """Jobs from `add` to `end`, and what wakes the ticks' thread."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._jobs: dict[str, ActiveJob] = {}
        self._arrived: list[ActiveJob] = []
        self._cancelled: list[ActiveJob] = []
        self._broken: Exception | None = None
        self.is_open = False
        self.is_stopping = False

    def add(self, active: ActiveJob, *, has_arrived: bool = True) -> None:
        """A job that `wait` hands out once the roster is open; one that has not arrived only after `arrive`."""
        with self._wake:
            self._jobs[active.job.id] = active
        if has_arrived:
            self.arrive(active)

    def arrive(self, active: ActiveJob) -> None:
        """A job is ready to be handed out."""
        with self._wake:
            active.is_encoding = False
            self._arrived.append(active)
            self._wake.notify()

    def open(self) -> None:
        """From now on those who arrived are handed out."""
        with self._wake:
            self.is_open = True
            self._wake.notify()

    def cancel(self, job_id: str, attempt: int) -> None:
        """Ask for a job's end; one that is not here as this attempt is ignored."""
        with self._wake:
            active = self._jobs.get(job_id)
            if active is not None and active.job.attempt == attempt:
                self._cancelled.append(active)
                self._wake.notify()

    def cut_short(self, job_id: str, attempt: int) -> None:
        """Let each image of a job have one more evaluation; one that is not here as this attempt is ignored."""
        with self._wake:
            active = self._jobs.get(job_id)
            if active is not None and active.job.attempt == attempt:
                active.is_cut_short = True

    def show(self, job_id: str, attempt: int, previews: Previews) -> None:
        """Make these previews of a job from now on; one that is not here as this attempt is ignored."""
        with self._wake:
            active = self._jobs.get(job_id)
            if active is not None and active.job.attempt == attempt:
                active.previews = previews

    def stop(self) -> None:
        """`wait` returns None from now on."""
        with self._wake:
            self.is_stopping = True
            self._wake.notify()

    def break_(self, error: Exception) -> None:
        """`wait` raises `error` from now on."""
        with self._wake:
            self._broken = error
            self._wake.notify()

    def wake(self) -> None:
        """Let a thread in `wait` ask again whether it has work."""
        with self._wake:
            self._wake.notify()

    def wait(self, has_work: Callable[[], bool]) -> News | None:
        """Wait for news, or until `has_work`, which is asked whenever something happened here; None when stopped."""
        with self._wake:
            while not (
                (self._arrived and self.is_open) or self._cancelled or self.is_stopping or self._broken or has_work()
            ):
                self._wake.wait()
            if self._broken is not None:
                raise self._broken
            if self.is_stopping:
                return None
            arrived: list[ActiveJob] = []
            if self.is_open:
                arrived, self._arrived = self._arrived, arrived
            cancelled, self._cancelled = self._cancelled, []
        return News(arrived, cancelled)

    def join(self, active: ActiveJob, rows: list[Row]) -> None:
        """A job has its rows, if it has not ended."""
        with self._wake:
            if not active.is_over:
                active.rows = rows

    def replace(self, row: Row, again: Row) -> None:
        """Another row makes the image of `row` from now on."""
        with self._wake:
            row.is_replaced = True
            if not row.active.is_over:
                row.active.rows[row.index] = again

    def end(self, active: ActiveJob) -> bool:
        """Mark a job's end and forget it. False when it has ended before."""
        with self._wake:
            if active.is_over:
                return False
            active.is_over = True
            # Rows and job know each other: held like that, they and their tensors would wait for the garbage collector.
            active.rows = []
            # A job that was lost and claimed again may be here twice, as two attempts.
            if self._jobs.get(active.job.id) is active:
                del self._jobs[active.job.id]
        return True

    def add_image(self, row: Row, image: bytes, decode: Interval, image_encode: Interval) -> bool:
        """An image of a job is there, decoded and compressed at these times. Returns whether it was the last one."""
        active = row.active
        with self._wake:
            active.images[row.index] = image
            active.decode_s = max(active.decode_s, decode.seconds)
            active.image_encode_s = max(active.image_encode_s, image_encode.seconds)
            active.note("decode", decode)
            active.note("image_encode", image_encode)
            return len(active.images) == len(active.rows)

    def rows(self) -> list[Row]:
        """Of all jobs that are here, those that were denoised and are not pictures yet included."""
        with self._wake:
            return [row for active in self._jobs.values() for row in active.rows]

    def encoding(self) -> set[str]:
        """The ids of jobs whose pictures are being encoded."""
        with self._wake:
            return {id_ for id_, active in self._jobs.items() if active.is_encoding}

    def unfinished_model_rows(self) -> int:
        """Model rows of jobs that are yet to be denoised."""
        with self._wake:
            return sum(
                active.job.request.num_model_rows
                for active in self._jobs.values()
                if any(not row.is_denoised for row in active.rows) or not active.rows
            )
