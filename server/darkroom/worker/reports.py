"""What a worker tells the queue of jobs that still run: their steps, their states, their previews, and the batch.

Of each image only the newest that is not yet written is kept, so an outage costs no memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from darkroom.config import Settings
from darkroom.engine.checkpoint import Checkpoint
from darkroom.engine.engine import Engine
from darkroom.engine.events import Preview, Saved, TickReport
from darkroom.errors import QueueUnavailable
from darkroom.jobs import Job
from darkroom.queue import JobQueue
from darkroom.worker.outages import every, pause

# Redis pays for each report of each busy worker, as `config.CHECKPOINT_WRITE_S` says.
PROGRESS_INTERVAL_S = 0.25
BATCH_INTERVAL_S = 0.25
# The states that a tick leaves come one by one from the engine's thread.
TICK_STATES_S = 0.005


class Reports:
    """`held` are the worker's jobs by id, as they are at any time: of others nothing is told."""

    def __init__(self, settings: Settings, queue: JobQueue, worker_id: str, held: Mapping[str, Job]) -> None:
        self._write_s = settings.checkpoint_write_s
        self._queue = queue
        self._worker_id = worker_id
        self._held = held
        self._loop = asyncio.get_running_loop()
        # Whether somebody looks at the batch.
        self.is_watched = False
        self._progress: dict[str, tuple[int, int]] = {}
        self._unsaved: dict[tuple[str, int, int], Checkpoint] = {}
        self._has_unsaved = asyncio.Event()
        self._unshown: dict[tuple[str, int, int], tuple[int, bytes]] = {}
        self._has_unshown = asyncio.Event()

    def loops(self, engine: Engine) -> list[Coroutine[Any, Any, None]]:
        """What has to run for as long as the worker does."""
        return [
            every(PROGRESS_INTERVAL_S, lambda: self._publish_progress(engine)),
            every(BATCH_INTERVAL_S, lambda: self._tell_batch(engine)),
            self._keep_new_checkpoints(),
            self._show_previews(),
            self._follow_looks(engine),
        ]

    def saved(self, saved: Saved) -> None:
        """Engine thread: a newer state of the same image takes the place of one that was not written yet."""
        image = (saved.job.id, saved.job.attempt, saved.checkpoint.index)
        self._loop.call_soon_threadsafe(self._note_saved, image, saved.checkpoint)

    def previewed(self, preview: Preview) -> None:
        """Engine threads: a newer preview of the same image takes the place of one that was not shown yet."""
        image = (preview.job.id, preview.job.attempt, preview.index)
        self._loop.call_soon_threadsafe(self._note_preview, image, (preview.step, preview.image))

    def note_progress(self, report: TickReport) -> None:
        for job, step, num_steps in report.progress:
            if step < num_steps:
                self._progress[job.id] = (step, num_steps)

    def forget_progress(self, job_id: str) -> None:
        """The job has come to its end: that is what will be told of it."""
        self._progress.pop(job_id, None)

    async def keep_checkpoints(self) -> None:
        """Write the states that are not written. Those that Redis does not take stay, unless newer ones come."""
        self._has_unsaved.clear()
        unsaved, self._unsaved = self._unsaved, {}
        states = {image: checkpoint.pack() for image, checkpoint in unsaved.items() if self._holds(*image[:2])}
        try:
            await self._queue.keep_checkpoints(self._worker_id, states)
        except BaseException:
            self._unsaved = {**unsaved, **self._unsaved}
            self._has_unsaved.set()
            raise

    def _holds(self, job_id: str, attempt: int) -> bool:
        return job_id in self._held and self._held[job_id].attempt == attempt

    def _note_saved(self, image: tuple[str, int, int], checkpoint: Checkpoint) -> None:
        self._unsaved[image] = checkpoint
        self._has_unsaved.set()

    def _note_preview(self, image: tuple[str, int, int], preview: tuple[int, bytes]) -> None:
        self._unshown[image] = preview
        self._has_unshown.set()

    async def _keep_new_checkpoints(self) -> None:
        """Write states at once, with those of the same tick, and then not for a while."""
        while True:
            await self._has_unsaved.wait()
            await asyncio.sleep(TICK_STATES_S)
            try:
                await self.keep_checkpoints()
            except QueueUnavailable as error:
                await pause(error)
            else:
                await asyncio.sleep(self._write_s)

    async def _show_previews(self) -> None:
        while True:
            await self._has_unshown.wait()
            self._has_unshown.clear()
            previews, self._unshown = self._unshown, {}
            held = {image: preview for image, preview in previews.items() if self._holds(*image[:2])}
            try:
                await self._queue.show(self._worker_id, held)
            except QueueUnavailable as error:
                # The next ones are as good.
                await pause(error)

    async def _follow_looks(self, engine: Engine) -> None:
        while True:
            try:
                async for job_id, attempt, previews in self._queue.looks(self._worker_id):
                    engine.show(job_id, attempt, previews)
            except QueueUnavailable as error:
                await pause(error)

    async def _publish_progress(self, engine: Engine) -> None:
        progress, self._progress = self._progress, {}
        updates = [
            (job_id, self._held[job_id].attempt, step, num_steps)
            for job_id, (step, num_steps) in progress.items()
            if job_id in self._held
        ]
        if updates:
            for (job_id, attempt), previews in (await self._queue.progress(self._worker_id, updates)).items():
                engine.show(job_id, attempt, previews)

    async def _tell_batch(self, engine: Engine) -> None:
        if self.is_watched:
            await self._queue.tell_batch(self._worker_id, engine.batch_view())
