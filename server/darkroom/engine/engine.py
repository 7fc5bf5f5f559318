"""The tick loop: choose rows, step them, settle them.

The engine knows nothing of Redis or HTTP. Jobs come in through `submit`, events go out through `on_event` and
`on_tick`, both called on engine threads and expected to return at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
import torch

from darkroom.config import Settings
from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.samplers import SamplerTable, compile_sampler
from darkroom.engine.batch import Batch
from darkroom.engine.batcher import Batcher, Choice, row_buckets
from darkroom.engine.decode import Decoder, Developed
from darkroom.engine.prompts import EncodedPrompt, Prompt, PromptCache
from darkroom.engine.row import ActiveJob, Conditioning, Row
from darkroom.engine.threads import use_cpu_threads
from darkroom.errors import DarkroomError, JobError
from darkroom.jobs import Failure, ImageInfo, Job, Result, Timings

MAX_DECODE_BATCH = 8

log = structlog.get_logger("darkroom.engine")


@dataclass(frozen=True)
class Finished:
    job: Job
    images: list[bytes]
    result: Result


@dataclass(frozen=True)
class Failed:
    job: Job
    failure: Failure


@dataclass(frozen=True)
class Cancelled:
    job: Job


@dataclass(frozen=True)
class Expired:
    """The job's deadline passed while it was here."""

    job: Job


Event = Finished | Failed | Cancelled | Expired


@dataclass(frozen=True)
class TickReport:
    """What one tick did. `progress` is (job, evaluations done by its slowest image, evaluations in all)."""

    choice: Choice
    seconds: float
    num_rows: int
    joined: int
    left: int
    waiting: int
    progress: list[tuple[Job, int, int]]


class Engine:
    """Runs jobs of `models` (by id) until `stop`; `clock` is in seconds and monotonic, `batcher` another policy."""

    def __init__(
        self,
        models: Mapping[str, DiffusionModel],
        settings: Settings,
        *,
        worker: str = "local",
        on_event: Callable[[Event], None],
        on_tick: Callable[[TickReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        batcher: Batcher | None = None,
    ) -> None:
        self.models = dict(models)
        self._worker = worker
        self._on_event = on_event
        self._on_tick = on_tick
        self._clock = clock
        is_reproducible = settings.batching == "reproducible"
        has_graphs = any(model.device.type == "cuda" for model in self.models.values())
        self.batcher = batcher or Batcher(
            row_buckets(
                settings.max_rows,
                is_reproducible=is_reproducible,
                reproducible_rows=settings.reproducible_rows,
                has_graphs=has_graphs,
            )
        )
        self._prompts = {
            id_: PromptCache(model, settings.prompt_cache_bytes, batch_alone=is_reproducible)
            for id_, model in self.models.items()
        }
        self._decoder = Decoder(
            self._developed,
            max_batch=1 if is_reproducible else MAX_DECODE_BATCH,
            encode_threads=settings.encode_threads,
        )
        self._num_threads = settings.num_threads or len(os.sched_getaffinity(0))
        self._wake = threading.Condition()
        self._inbox: list[ActiveJob] = []
        self._cancelled: list[ActiveJob] = []
        self._is_stopping = False
        self._rows: dict[int, Row] = {}
        self._jobs: dict[str, ActiveJob] = {}
        self._batch: Batch | None = None

    def submit(self, job: Job, *, deadline_in_s: float | None = None) -> None:
        """Hand a job to the engine. It joins at the next tick; `deadline_in_s` counts from now.

        Raises `ValueError` when the job asks for a model that this engine does not hold.
        """
        if job.request.model not in self.models:
            raise ValueError(f"model: got {job.request.model!r}, expected one of {sorted(self.models)}")
        now_s = self._clock()
        active = ActiveJob(job, now_s, None if deadline_in_s is None else now_s + deadline_in_s)
        with self._wake:
            self._jobs[job.id] = active
            self._inbox.append(active)
            self._wake.notify()

    def cancel(self, job_id: str, attempt: int = 0) -> None:
        """Drop a job's rows before the next tick; `Cancelled` follows unless it ends first.

        An unknown id is ignored, and so is one that is here as another attempt.
        """
        with self._wake:
            active = self._jobs.get(job_id)
            if active is not None and active.job.attempt == attempt:
                self._cancelled.append(active)
                self._wake.notify()

    def stop(self) -> None:
        """End `run` after the tick in flight."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()

    def resident_model_rows(self) -> int:
        """Model rows held or about to be held; what a worker subtracts from its room before it claims more."""
        with self._wake:
            return sum(
                active.job.request.num_model_rows
                for active in self._jobs.values()
                if any(not row.is_denoised for row in active.rows) or not active.rows
            )

    def run(self) -> None:
        """The loop. Returns after `stop`; unfinished jobs stay unfinished and no event is sent for them.

        The thread that runs it gets all CPU threads, and should be the only one that does (`use_cpu_threads`).
        """
        use_cpu_threads(self._num_threads)
        try:
            self._loop()
        finally:
            self._decoder.close()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._rows or self._inbox or self._cancelled or self._is_stopping):
                    self._wake.wait()
                if self._is_stopping:
                    return
                arrived, self._inbox = self._inbox, []
                cancelled, self._cancelled = self._cancelled, []
            for active in cancelled:
                self._end(active, Cancelled(active.job))
            self._expire()
            joined = self._join([active for active in arrived if not active.is_over])
            self._rows = {id_: row for id_, row in self._rows.items() if not row.active.is_over}
            choice = self.batcher.choose((row.candidate() for row in self._rows.values()), self._clock())
            if choice is not None:
                self._tick(choice, joined)

    def _tick(self, choice: Choice, joined: int) -> None:
        started_s = self._clock()
        rows = tuple(self._rows[id_] for id_ in choice.ids)
        try:
            if self._batch is None or self._batch.rows != rows or self._batch.bucket != choice.bucket:
                self._batch = Batch(rows, choice.bucket)
            self._batch.tick()
        except Exception as error:
            self._batch = None
            self._fail_tick(choice, rows, error)
            return
        now_s = self._clock()
        left = self._settle(rows, choice, started_s, now_s)
        self.batcher.account(choice.key, now_s - started_s, max(row.active.job.priority.rank for row in rows))
        if self._on_tick is not None:
            jobs = list(dict.fromkeys(row.active for row in rows))
            self._on_tick(
                TickReport(
                    choice=choice,
                    seconds=now_s - started_s,
                    num_rows=len(rows),
                    joined=joined,
                    left=left,
                    waiting=len(self._rows) + left - len(rows),
                    progress=[(active.job, active.step, active.num_steps) for active in jobs],
                )
            )

    def _settle(self, rows: tuple[Row, ...], choice: Choice, started_s: float, now_s: float) -> int:
        left = 0
        for row in rows:
            active = row.active
            row.waiting_since_s = now_s
            active.last_tick_s = now_s
            active.max_batch_rows = max(active.max_batch_rows, choice.model_rows)
            if active.first_tick_s is None:
                active.first_tick_s = started_s
            if row.is_denoised:
                del self._rows[row.id]
                left += 1
                # The batch that this row is a view of may live on; the decoder needs it unchanged.
                self._decoder.submit(row, row.latents, None)
        return left

    def _expire(self) -> None:
        """Jobs past their deadline cost no further tick."""
        now_s = self._clock()
        late = {row.active for row in self._rows.values() if row.active.is_late(now_s)}
        for active in late:
            self._end(active, Expired(active.job))

    def _fail_tick(self, choice: Choice, rows: tuple[Row, ...], error: Exception) -> None:
        """One row may be the cause: try each alone once, and fail only those that fail alone."""
        log.error("tick_failed", rows=len(rows), error=type(error).__name__, exc_info=error)
        for row in rows:
            if len(rows) > 1:
                started_s = self._clock()
                try:
                    Batch((row,), next(b for b in self.batcher.buckets if b >= len(row.conditionings))).tick()
                    self._settle((row,), choice, started_s, self._clock())
                    continue
                except Exception as alone:
                    error = alone
            self._end(row.active, Failed(row.active.job, failure_of(error)))

    def _join(self, arrived: list[ActiveJob]) -> int:
        """Encode the newcomers' prompts, compile their tables, draw their first noise. Returns rows joined."""
        joined = 0
        for model_id, jobs in _by_model(arrived).items():
            started_s = self._clock()
            model = self.models[model_id]
            encoded = self._encode(model, jobs)
            jobs = [active for active in jobs if not active.is_over]
            for active in jobs:
                try:
                    rows = make_rows(model, active, encoded, self._clock())
                except Exception as error:
                    self._end(active, Failed(active.job, failure_of(error)))
                    continue
                active.encode_s = self._clock() - started_s
                with self._wake:
                    active.rows = rows
                self._rows.update((row.id, row) for row in rows)
                joined += len(rows)
        return joined

    def _encode(self, model: DiffusionModel, jobs: list[ActiveJob]) -> dict[Prompt, EncodedPrompt]:
        """The prompts of all `jobs`; where they cannot be encoded together, each job's by itself."""
        cache = self._prompts[model.id]
        try:
            return cache.encode([prompt for active in jobs for prompt in prompts_of(model, active.job)])
        except Exception as error:
            if len(jobs) == 1:
                self._end(jobs[0], Failed(jobs[0].job, failure_of(error)))
                return {}
        encoded: dict[Prompt, EncodedPrompt] = {}
        for active in jobs:
            encoded |= self._encode(model, [active])
        return encoded

    def _developed(self, developed: Developed) -> None:
        row, active = developed.row, developed.row.active
        if isinstance(developed.outcome, Exception):
            self._end(active, Failed(active.job, failure_of(developed.outcome)))
            return
        with self._wake:
            active.images[row.index] = developed.outcome
            active.decode_s = max(active.decode_s, developed.decode_s)
            active.image_encode_s = max(active.image_encode_s, developed.image_encode_s)
            if len(active.images) < len(active.rows):
                return
        images = [active.images[i] for i in range(len(active.rows))]
        self._end(active, Finished(active.job, images, self._result(active, images, row.model)))

    def _result(self, active: ActiveJob, images: list[bytes], model: DiffusionModel) -> Result:
        request = active.job.request
        return Result(
            images=[
                ImageInfo(
                    index=i,
                    seed=request.seed + i,
                    format=request.output_format,
                    width=request.width,
                    height=request.height,
                    num_bytes=len(data),
                )
                for i, data in enumerate(images)
            ],
            timings=Timings(
                encode_s=active.encode_s,
                denoise_s=active.last_tick_s - (active.first_tick_s or active.last_tick_s),
                decode_s=active.decode_s,
                image_encode_s=active.image_encode_s,
            ),
            weights_hash=model.card.weights_hash,
            worker=self._worker,
            max_batch_rows=active.max_batch_rows,
        )

    def _end(self, active: ActiveJob, event: Event) -> None:
        """Send a job's one terminal event and forget the job; a second end of the same job is ignored.

        May run on a decoder thread; the tick thread drops the job's rows before its next choice.
        """
        with self._wake:
            if active.is_over:
                return
            active.is_over = True
            # A job that was lost and claimed again may be here twice, as two attempts.
            if self._jobs.get(active.job.id) is active:
                del self._jobs[active.job.id]
        self._on_event(event)


def prompts_of(model: DiffusionModel, job: Job) -> list[Prompt]:
    """The prompt, and with guidance the negative prompt, of a job."""
    request = job.request
    prompts = [Prompt(request.prompt, request.clip_skip, False)]
    if uses_negative_prompt(model, job):
        prompts.append(Prompt(request.negative_prompt, request.clip_skip, True))
    return prompts


def uses_negative_prompt(model: DiffusionModel, job: Job) -> bool:
    """Guidance by a second model row; a model that embeds the guidance scale needs none."""
    return job.request.uses_guidance and not model.embeds_guidance


def make_rows(
    model: DiffusionModel, active: ActiveJob, encoded: Mapping[Prompt, EncodedPrompt], now_s: float
) -> list[Row]:
    """Rows of a job at step 0: compiled table, first noise from each row's own seed, conditioning for every step."""
    request = active.job.request
    table = compile_sampler(request.sampler, model.schedule, request.num_inference_steps, request.sigma_schedule)
    conditionings = tuple(
        Conditioning(encoded[prompt].text_kv, time_projection(model, active.job, table, encoded[prompt]))
        for prompt in prompts_of(model, active.job)
    )
    shape = (
        model.latent_channels,
        request.height // model.vae_scale_factor,
        request.width // model.vae_scale_factor,
    )
    rows = []
    for index in range(request.num_images_per_prompt):
        generator = torch.Generator().manual_seed(request.seed + index)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32) * table.initial_scale
        rows.append(
            Row(
                active=active,
                model=model,
                index=index,
                seed=request.seed + index,
                table=table,
                generator=generator,
                latents=noise.to(model.device),
                previous=torch.zeros((2, *shape), device=model.device),
                conditionings=conditionings,
                guidance_scale=request.guidance_scale if len(conditionings) > 1 else 1.0,
                waiting_since_s=now_s,
            )
        )
    return rows


@torch.inference_mode()
def time_projection(model: DiffusionModel, job: Job, table: SamplerTable, encoded: EncodedPrompt) -> torch.Tensor:
    """`[E, time_width]`: the time embedding of every evaluation of this job, computed once."""
    request = job.request
    time_ids = model.time_ids(request.width, request.height)
    projection: torch.Tensor = model.unet.time_projection(
        table.timesteps.to(model.device),
        pooled_prompt_embeds=encoded.pooled if time_ids is not None else None,
        time_ids=time_ids,
        guidance_embedding_scale=request.guidance_scale if model.embeds_guidance else None,
    )
    return projection


def failure_of(error: Exception) -> Failure:
    """What a client may be told: our own errors by their text, everything else as an internal error."""
    if isinstance(error, DarkroomError):
        return Failure(code=error.code if isinstance(error, JobError) else "job_failed", message=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return Failure(code="out_of_memory", message="the device ran out of memory for this request")
    log.error("job_failed", error=type(error).__name__, exc_info=error)
    return Failure(code="job_failed", message="the picture could not be made because of an internal error")


def _by_model(jobs: list[ActiveJob]) -> dict[str, list[ActiveJob]]:
    grouped: dict[str, list[ActiveJob]] = {}
    for active in jobs:
        grouped.setdefault(active.job.request.model, []).append(active)
    return grouped
