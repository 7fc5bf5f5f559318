"""A worker with a known answer: it settles jobs through the real queue at once, or as slowly and badly as a test asks.

Its picture of a job is one flat colour that follows from the seed, so a test knows what it must get.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator

from darkroom.errors import ResultStoreUnavailable
from darkroom.jobs import BatchRow, BatchView, Failure, ImageInfo, Job, ModelCard, Result, Timings
from darkroom.queue import JobQueue
from darkroom.sampling import SAMPLERS, SIGMA_SCHEDULES, num_evaluations
from PIL import Image


def card(model: str = "test-world", **changes: object) -> ModelCard:
    """The card of a small model with every sampler."""
    fields: dict[str, object] = {
        "id": model,
        "family": "test",
        "weights_hash": "0123456789abcdef",
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "sampler": "dpmpp_2m",
        "sigma_schedule": "karras",
        "samplers": list(SAMPLERS),
        "sigma_schedules": list(SIGMA_SCHEDULES),
        "size_multiple": 8,
        "vae_scale_factor": 4,
        "max_width": 256,
        "max_height": 256,
        "max_clip_skip": 2,
        "example_prompts": ["a red fox"],
        **changes,
    }
    return ModelCard(**fields)  # type: ignore[arg-type]


def _jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, format="jpeg")
    return out.getvalue()


def colour(seed: int) -> tuple[int, int, int]:
    return seed % 251, seed // 251 % 251, 128


class InstantWorker:
    """Claims everything and settles it.

    `failure` makes every job fail with it; while `gate` is not set, claimed jobs stop after their first step and leave
    only when cancelled, with a picture where that is to be kept.
    """

    preview = _jpeg()

    def __init__(self, queue: JobQueue, *cards: ModelCard, worker_id: str = "instant") -> None:
        self.queue = queue
        self.worker_id = worker_id
        self.cards = cards or (card(),)
        self.failure: Failure | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        # What the jobs began with, by job id and name.
        self.inputs: dict[str, dict[str, bytes]] = {}
        self._held: set[asyncio.Task[None]] = set()
        self._jobs: dict[str, Job] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[InstantWorker]:
        await self.queue.register(self.worker_id, self.cards)
        serving = asyncio.ensure_future(self._serve())
        try:
            yield self
        finally:
            tasks = {serving, *self._held}
            while tasks:
                # Again and again: a cancellation can get lost where the Redis client times out at the same moment.
                for task in tasks:
                    task.cancel()
                _, tasks = await asyncio.wait(tasks, timeout=0.1)
            await self.queue.unregister(self.worker_id)

    async def _serve(self) -> None:
        models = [one.id for one in self.cards]
        while True:
            for job in await self.queue.claim(self.worker_id, models, 64, 1024):
                task = asyncio.ensure_future(self._settle(job))
                self._held.add(task)
                task.add_done_callback(self._held.discard)
            if await self.queue.heartbeat(self.worker_id):
                await self.queue.tell_batch(self.worker_id, self._batch())
            await self.queue.wait_for_work(models, 0.5)

    async def show(self, step: int) -> None:
        """Let all held jobs come to a step, and their first images be seen at it."""
        for job in self._jobs.values():
            steps = num_evaluations(job.request.sampler, job.request.num_inference_steps, job.request.strength)
            await self.queue.progress(self.worker_id, [(job.id, job.attempt, step, steps)])
            await self.queue.show(self.worker_id, {(job.id, job.attempt, 0): (step, self.preview)})

    def _batch(self) -> BatchView:
        rows = [
            BatchRow(id=index, job_id=job.id, state="in_tick", step=1, num_steps=4)
            for index, job in enumerate(self._jobs.values())
        ]
        return BatchView(rows=rows, max_model_rows=8)

    async def _settle(self, job: Job) -> None:
        self._jobs[job.id] = job
        try:
            await self._draw(job)
        finally:
            del self._jobs[job.id]

    async def _draw(self, job: Job) -> None:
        request = job.request
        steps = num_evaluations(request.sampler, request.num_inference_steps, request.strength)
        self.inputs[job.id] = await self.queue.inputs(job)
        await self.queue.progress(self.worker_id, [(job.id, job.attempt, 1, steps)])
        self.started.set()
        if not self.gate.is_set():
            cancelled = asyncio.ensure_future(self._cancelled(job))
            opened = asyncio.ensure_future(self.gate.wait())
            try:
                await asyncio.wait((cancelled, opened), return_when=asyncio.FIRST_COMPLETED)
                if cancelled.done() and not cancelled.result():
                    await self.queue.acknowledge_cancel(self.worker_id, job)
                    return
            finally:
                cancelled.cancel()
                opened.cancel()
        if self.failure is not None:
            await self.queue.fail(self.worker_id, job, self.failure)
            return
        await self.queue.progress(self.worker_id, [(job.id, job.attempt, steps, steps)])
        images = [self._picture(job, index) for index in range(request.num_images_per_prompt)]
        infos = [
            ImageInfo(
                index=index,
                seed=request.seed + index,
                format=request.output_format,
                width=request.width,
                height=request.height,
                num_bytes=len(image),
            )
            for index, image in enumerate(images)
        ]
        result = Result(
            images=infos,
            timings=Timings(queue_s=0.001, encode_s=0.002, denoise_s=0.003, decode_s=0.004),
            weights_hash=self.cards[0].weights_hash,
            worker=self.worker_id,
            max_batch_rows=2,
        )
        try:
            result = await self.queue.store_images(job, result, images)
        except ResultStoreUnavailable as error:
            await self.queue.fail(self.worker_id, job, Failure(code=error.code, message=str(error)))
            return
        await self.queue.succeed(self.worker_id, job, result, images)

    async def _cancelled(self, job: Job) -> bool:
        """Wait until a job is cancelled. Returns whether its pictures are to be kept."""
        hints = self.queue.cancellations(self.worker_id)
        hint = asyncio.ensure_future(anext(hints))
        try:
            # One that came before anybody listened is told here.
            while True:
                renewal = await self.queue.renew(self.worker_id, {job.id: job.attempt})
                if job.id in renewal.cancelled | renewal.cut_short:
                    return job.id in renewal.cut_short
                await asyncio.wait((hint,), timeout=0.2)
                if hint.done():
                    hint = asyncio.ensure_future(anext(hints))
        finally:
            hint.cancel()

    def _picture(self, job: Job, index: int) -> bytes:
        request = job.request
        out = io.BytesIO()
        Image.new("RGB", (request.width, request.height), colour(request.seed + index)).save(
            out, format=request.output_format
        )
        return out.getvalue()
