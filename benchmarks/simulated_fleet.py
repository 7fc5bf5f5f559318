"""Workers and clients for `benchmarks.fleet`: everything is real but the engine, which knows its answer beforehand.

A simulated worker is `darkroom.worker.worker.Worker` itself with a `JobQueue` and connections of its own; its engine
counts ticks on a timer and answers with fixed bytes of a real picture's size. A simulated client does what a waiting
`POST /generate` does.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import structlog
from darkroom.config import Settings
from darkroom.engine.batcher import BatchKey, Choice
from darkroom.engine.events import Cancelled, Event, Finished, Preview, Saved, TickReport
from darkroom.engine.pulse import Pulse
from darkroom.errors import DarkroomError, QueueFull, StorageFull
from darkroom.jobs import GenerationRequest, ImageInfo, Job, JobState, ModelCard, Previews, Result, Timings, new_job_id
from darkroom.queue import JobQueue
from darkroom.worker.reports import PROGRESS_INTERVAL_S
from darkroom.worker.worker import Worker

LAG_INTERVAL_S = 0.05
WAIT_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Load:
    """What a fleet serves. Times in seconds; `row_s` is one model row's part of a tick, `least_tick_s` a tick's least
    length, `decode_s` what a finished picture adds to it."""

    model: str
    side_px: int
    num_steps: int
    row_s: float
    least_tick_s: float
    decode_s: float
    picture_bytes: int
    max_model_rows: int = 32

    @property
    def capacity(self) -> float:
        """Jobs per second of one full worker, one guided picture each."""
        pairs = self.max_model_rows // 2
        tick_s = max(self.least_tick_s, self.max_model_rows * self.row_s)
        return pairs / (self.num_steps * tick_s + pairs * self.decode_s)

    def card(self) -> ModelCard:
        return ModelCard(
            id=self.model,
            family=self.model,
            weights_hash="0" * 16,
            width=self.side_px,
            height=self.side_px,
            num_inference_steps=self.num_steps,
            guidance_scale=7.5,
            sampler="dpmpp_2m",
            sigma_schedule="karras",
            samplers=["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "ddim", "unipc"],
            sigma_schedules=["simple", "karras", "exponential"],
            size_multiple=8,
            vae_scale_factor=8,
            max_width=2048,
            max_height=2048,
            example_prompts=["a lighthouse at dusk, oil on canvas", "an otter reading the newspaper, studio light"],
        )

    def job(self, randomness: random.Random) -> Job:
        request = GenerationRequest(
            prompt="a lighthouse on a cliff at dusk, long exposure, dramatic clouds, highly detailed, 35mm photograph",
            negative_prompt="blurry, low quality, watermark, text, deformed hands",
            model=self.model,
            width=self.side_px,
            height=self.side_px,
            num_inference_steps=self.num_steps,
            guidance_scale=7.5,
            seed=randomness.getrandbits(32),
            sampler="dpmpp_2m",
            sigma_schedule="karras",
        )
        return Job(id=new_job_id(), request=request, cost=2.0 * self.num_steps * (self.side_px // 8) ** 2)


@dataclass
class Samples:
    """What one process saw: (time.monotonic() at the end, seconds) of each call, and each request's (end, outcome)."""

    claims: list[tuple[float, float]] = field(default_factory=list)
    enqueues: list[tuple[float, float]] = field(default_factory=list)
    lags: list[tuple[float, float]] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    ends: list[tuple[float, str]] = field(default_factory=list)


class TimedQueue(JobQueue):
    """A queue that writes down how long its claims and enqueues take."""

    def __init__(self, settings: Settings, url: str, samples: Samples) -> None:
        super().__init__(settings, url)
        self._samples = samples

    async def claim(self, *args: Any, **kwargs: Any) -> list[Job]:
        return await _timed(self._samples.claims, super().claim(*args, **kwargs))

    async def enqueue(self, *args: Any, **kwargs: Any) -> Any:
        return await _timed(self._samples.enqueues, super().enqueue(*args, **kwargs))


async def _timed(samples: list[tuple[float, float]], call: Coroutine[Any, Any, Any]) -> Any:
    started = time.monotonic()
    result = await call
    ended = time.monotonic()
    samples.append((ended, ended - started))
    return result


@dataclass
class _Row:
    job: Job
    step: int = 0


class KnownAnswerEngine:
    """The engine as `Worker` sees it. Ticks are timers on the worker's own loop; every answer is `picture`."""

    def __init__(
        self,
        load: Load,
        picture: bytes,
        *,
        worker: str,
        on_event: Callable[[Event], None],
        on_tick: Callable[[TickReport], None],
        on_ready: Callable[[], None],
        on_saved: Callable[[Saved], None],
        on_preview: Callable[[Preview], None],
    ) -> None:
        self.models = {load.model: SimpleNamespace(card=load.card())}
        self.batcher = SimpleNamespace(max_model_rows=load.max_model_rows)
        self.pulse = Pulse(least_s=15.0)
        self._load, self._picture, self._worker = load, picture, worker
        self._on_event, self._on_tick, self._on_ready = on_event, on_tick, on_ready
        self._loop = asyncio.get_running_loop()
        self._stopped = threading.Event()
        self._rows: dict[tuple[str, int], _Row] = {}
        self._cancelled: set[tuple[str, int]] = set()
        self._is_ticking = False
        self._reported_at = 0.0

    def run(self) -> None:
        self._on_ready()
        self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()

    def submit(
        self,
        job: Job,
        *,
        deadline_in_s: float | None = None,
        checkpoints: Mapping[int, bytes] | None = None,
        inputs: Mapping[str, bytes] | None = None,
    ) -> None:
        self._rows[job.id, job.attempt] = _Row(job)
        if not self._is_ticking:
            self._start_tick()

    def show(self, job_id: str, attempt: int, previews: Previews) -> None:
        """Nobody watches these."""

    def cancel(self, job_id: str, attempt: int) -> None:
        if (job_id, attempt) in self._rows:
            self._cancelled.add((job_id, attempt))

    def resident_model_rows(self) -> int:
        return sum(row.job.request.num_model_rows for row in self._rows.values())

    def _start_tick(self) -> None:
        chosen, model_rows = [], 0
        for attempt, row in self._rows.items():
            model_rows += row.job.request.num_model_rows
            if model_rows > self._load.max_model_rows and chosen:
                break
            chosen.append(attempt)
        self._is_ticking = bool(chosen) and not self._stopped.is_set()
        if self._is_ticking:
            last = sum(self._rows[attempt].step + 1 == self._load.num_steps for attempt in chosen)
            tick_s = max(self._load.least_tick_s, model_rows * self._load.row_s) + last * self._load.decode_s
            self._loop.call_later(tick_s, self._end_tick, chosen, model_rows, tick_s)

    def _end_tick(self, chosen: list[tuple[str, int]], model_rows: int, tick_s: float) -> None:
        left = []
        for attempt in chosen:
            row = self._rows[attempt]
            row.step += 1
            if attempt in self._cancelled or row.step == self._load.num_steps:
                left.append(attempt)
        for attempt in left:
            job = self._rows.pop(attempt).job
            if attempt in self._cancelled:
                self._cancelled.discard(attempt)
                self._on_event(Cancelled(job))
            else:
                self._on_event(Finished(job, [self._picture], self._result(job), {}))
        # The worker looks at progress once in its interval, so a tick between has nothing to say.
        if left or self._loop.time() - self._reported_at >= PROGRESS_INTERVAL_S:
            self._reported_at = self._loop.time()
            progress = [
                (row.job, row.step, self._load.num_steps) for attempt in chosen if (row := self._rows.get(attempt))
            ]
            key = BatchKey(self._load.model, self._load.side_px // 8, self._load.side_px // 8)
            choice = Choice(key, (), model_rows, model_rows)
            self._on_tick(TickReport(choice, tick_s, self._loop.time(), len(chosen), 0, len(left), {}, progress))
        self._start_tick()

    def _result(self, job: Job) -> Result:
        request = job.request
        info = ImageInfo(
            index=0,
            seed=request.seed,
            format=request.output_format,
            width=request.width,
            height=request.height,
            num_bytes=len(self._picture),
        )
        timings = Timings(encode_s=0.01, denoise_s=request.num_inference_steps * self._load.least_tick_s)
        return Result(
            images=[info], timings=timings, weights_hash="0" * 16, worker=self._worker, max_batch_rows=job.attempt
        )


def run_workers(pipe: Connection, settings: Settings, url: str, load: Load, count: int, seed: int) -> None:
    """Process of `count` workers. Sends "ready" once all are registered; answers any message with its `Samples`."""

    async def start(samples: Samples) -> list[asyncio.Task[None]]:
        picture = random.Random(seed).randbytes(load.picture_bytes)
        tasks, ready = [], []
        for _ in range(count):
            is_ready = asyncio.Event()
            queue = TimedQueue(settings, url, samples)
            worker = Worker(settings, queue, lambda **options: KnownAnswerEngine(load, picture, **options))  # type: ignore[arg-type, return-value]
            tasks.append(asyncio.create_task(worker.run(is_ready.set)))
            ready.append(is_ready.wait())
            # A worker's id holds the millisecond of its start; and no fleet starts, or beats, as one.
            await asyncio.sleep(0.005)
        await asyncio.gather(*ready)
        return tasks

    _run(pipe, start)


def run_clients(
    pipe: Connection, settings: Settings, url: str, load: Load, rate: float, cancelled_share: float, seed: int
) -> None:
    """Process of one API's clients, who arrive at `rate` per second whatever becomes of those before them.

    `cancelled_share` of them cancel half a second after they came.
    """

    async def start(samples: Samples) -> list[asyncio.Task[None]]:
        queue = TimedQueue(settings, url, samples)
        return [asyncio.create_task(_arrive(queue, load, rate, cancelled_share, samples, random.Random(seed)))]

    _run(pipe, start)


def _run(pipe: Connection, start: Callable[[Samples], Coroutine[Any, Any, list[asyncio.Task[None]]]]) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))

    async def main() -> None:
        samples = Samples()
        tasks = [*await start(samples), asyncio.create_task(_watch_lag(samples))]
        pipe.send("ready")
        asked = asyncio.ensure_future(asyncio.to_thread(pipe.recv))
        done, _ = await asyncio.wait([asked, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {asked}:
            task.result()
        pipe.send(samples)
        # The parent ends the fleet and its Redis together: nobody needs an orderly drain.
        await asyncio.to_thread(pipe.recv)

    asyncio.run(main())


async def _watch_lag(samples: Samples) -> None:
    """How late this loop is: what the generator adds to every latency it measures."""
    while True:
        started = time.monotonic()
        await asyncio.sleep(LAG_INTERVAL_S)
        ended = time.monotonic()
        samples.lags.append((ended, ended - started - LAG_INTERVAL_S))


async def _arrive(
    queue: JobQueue,
    load: Load,
    rate: float,
    cancelled_share: float,
    samples: Samples,
    randomness: random.Random,
) -> None:
    requests: set[asyncio.Task[None]] = set()
    at_s = time.monotonic()
    while True:
        at_s += randomness.expovariate(rate)
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        cancels = randomness.random() < cancelled_share
        request = asyncio.create_task(_request(queue, load.job(randomness), cancels, samples))
        requests.add(request)
        request.add_done_callback(requests.discard)


async def _request(queue: JobQueue, job: Job, cancels: bool, samples: Samples) -> None:
    """What `POST /generate` does, from the model's card to the picture."""
    samples.sent.append(time.monotonic())
    try:
        await queue.cards()
        side_px = job.request.width
        await queue.enqueue(job, result_bytes=side_px * side_px * 3, body_hash=job.id, caller=job.id)
        if cancels:
            await asyncio.sleep(0.5)
            await queue.cancel(job.id)
        status = await queue.wait(job.id, WAIT_TIMEOUT_S)
        if status.state is JobState.SUCCEEDED:
            await queue.image(job.id, 0)
        outcome = status.state.value
    except (QueueFull, StorageFull):
        outcome = "refused"
    except DarkroomError:
        # Past its end Redis answers too late or not at all, and a picture may expire before it is fetched.
        outcome = "failed"
    samples.ends.append((time.monotonic(), outcome))
