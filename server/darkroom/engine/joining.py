"""From a job to its rows: its encoded prompts, its compiled table, its first noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog
import torch
from torch import Tensor

from darkroom import metrics
from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.samplers import SamplerTable, compile_sampler
from darkroom.engine.batcher import BatchKey
from darkroom.engine.checkpoint import unpack
from darkroom.engine.device import TickDevice
from darkroom.engine.events import Event, failed
from darkroom.engine.prompts import EncodedPrompt, Prompt, PromptCache
from darkroom.engine.roster import Roster
from darkroom.engine.row import ActiveJob, Conditioning, Interval, Row
from darkroom.engine.start import start_of
from darkroom.jobs import GenerationRequest, Job
from darkroom.sampling import first_step

log = structlog.get_logger("darkroom.engine")


class Joiner:
    """Makes rows of the jobs that arrive. `postponed` are those whose texts find no place until others have left.

    A job that cannot have rows gets its `end`. Only the ticks' thread may call.
    """

    def __init__(
        self,
        device: TickDevice,
        models: Mapping[str, DiffusionModel],
        prompts: Mapping[str, PromptCache],
        roster: Roster,
        end: Callable[[ActiveJob, Event], None],
        clock: Callable[[], float],
    ) -> None:
        self._device, self._models, self._prompts, self._roster = device, models, prompts, roster
        self._end, self._clock = end, clock
        self.postponed: list[ActiveJob] = []

    def take_postponed(self) -> list[ActiveJob]:
        """Those that were postponed, to be tried again."""
        postponed, self.postponed = self.postponed, []
        return postponed

    def join(self, arrived: list[ActiveJob]) -> list[Row]:
        """Encode the newcomers' prompts, compile their tables, draw their first noise. Returns their rows; each that
        is not denoised yet holds a reference to each of its texts."""
        joined: list[Row] = []
        for model_id, jobs in _by_model(arrived).items():
            started_s = self._clock()
            model, cache = self._models[model_id], self._prompts[model_id]
            jobs = self._admit(model, jobs)
            encoded = self._encode(model, jobs)
            for active in jobs:
                if active.is_over:
                    continue
                try:
                    rows = make_rows(self._device, model, active, encoded, self._clock())
                except Exception as error:
                    if self._device.is_lost(error):
                        raise
                    self._end(active, failed(active, error))
                    continue
                for row in rows:
                    if not row.is_denoised:
                        cache.retain(conditioning.encoded for conditioning in row.conditionings)
                active.note("encode", Interval(started_s, self._clock()))
                self._roster.join(active, rows)
                joined += rows
            cache.release(encoded.values())
        return joined

    def _admit(self, model: DiffusionModel, jobs: list[ActiveJob]) -> list[ActiveJob]:
        """The jobs, most urgent class first, whose texts the model's store has room for; the others are postponed."""
        cache = self._prompts[model.id]
        admitted, prompts = list[ActiveJob](), set[Prompt]()
        for active in sorted(jobs, key=lambda active: -active.job.priority.rank):
            wanted = prompts.union(prompts_of(model, active.job))
            if cache.has_room(wanted):
                admitted.append(active)
                prompts = wanted
            else:
                self.postponed.append(active)
        return admitted

    def _encode(self, model: DiffusionModel, jobs: list[ActiveJob]) -> dict[Prompt, EncodedPrompt]:
        """The prompts of all `jobs`, one reference each; if they cannot be encoded together, each job's by itself."""
        cache = self._prompts[model.id]
        try:
            return cache.encode([prompt for active in jobs for prompt in prompts_of(model, active.job)])
        except Exception as error:
            if self._device.is_lost(error):
                raise
            if len(jobs) == 1:
                self._end(jobs[0], failed(jobs[0], error))
                return {}
        encoded: dict[Prompt, EncodedPrompt] = {}
        for active in jobs:
            own = self._encode(model, [active])
            cache.release(entry for prompt, entry in own.items() if prompt in encoded)
            encoded |= own
        return encoded


def key_of(model: DiffusionModel, width: int, height: int, text_chunks: int = 1) -> BatchKey:
    """The batch key of pictures of `width` × `height` pixels whose longer text has `text_chunks`."""
    return BatchKey(model.id, height // model.vae_scale_factor, width // model.vae_scale_factor, text_chunks)


def prompts_of(model: DiffusionModel, job: Job) -> list[Prompt]:
    """The prompt, and with guidance the negative prompt, of a job."""
    request = job.request
    is_weighted = request.prompt_syntax == "weighted"
    prompts = [Prompt(request.prompt, request.clip_skip, False, is_weighted)]
    if uses_negative_prompt(model, job):
        prompts.append(Prompt(request.negative_prompt, request.clip_skip, True, is_weighted))
    return prompts


def uses_negative_prompt(model: DiffusionModel, job: Job) -> bool:
    """Guidance by a second model row; a model that embeds the guidance scale needs none."""
    return job.request.uses_guidance and not model.embeds_guidance


def make_rows(
    device: TickDevice, model: DiffusionModel, active: ActiveJob, encoded: Mapping[Prompt, EncodedPrompt], now_s: float
) -> list[Row]:
    """Rows of a job, at step 0 or where a checkpoint says: compiled table, first noise from each row's own seed,
    conditioning for every step."""
    request = active.job.request
    steps = request.num_inference_steps
    first = first_step(steps, request.strength) if request.init_image else 0
    table = compile_sampler(request.sampler, model.schedule, steps, request.sigma_schedule, first)
    prompts = [encoded[prompt] for prompt in prompts_of(model, active.job)]
    lines = [time_lines(device, model, request, table, prompts[0])]
    # Where the text has no say in it, both model rows are at the same time.
    for prompt in prompts[1:]:
        lines.append(lines[0] if prompt.pooled is None else time_lines(device, model, request, table, prompt))
    conditionings = tuple(map(Conditioning, prompts, lines))
    key = key_of(model, request.width, request.height, max(len(prompt.chunks) for prompt in prompts))
    shape = (model.latent_channels, key.height, key.width)
    rows = []
    for index in range(request.num_images_per_prompt):
        generator = torch.Generator().manual_seed(request.seed + index)
        start = start_of(device, active.start, table, shape, generator, request.strength)
        row = Row(
            active=active,
            model=model,
            key=key,
            index=index,
            seed=request.seed + index,
            table=table,
            generator=generator,
            shape=shape,
            first_latents=start.latents,
            kept=start.kept,
            condition=start.condition,
            conditionings=conditionings,
            guidance_scale=request.guidance_scale if len(conditionings) > 1 else 1.0,
            waiting_since_s=now_s,
            saved_s=now_s,
        )
        if index in active.checkpoints:
            _resume(row, active.checkpoints[index])
        rows.append(row)
    return rows


def _resume(row: Row, data: bytes) -> None:
    checkpoint = unpack(data, row.index, row.fingerprint, row.shape)
    if checkpoint is None or checkpoint.num_done > row.table.num_evaluations:
        log.warning("checkpoint_not_usable", job_id=row.active.job.id, image=row.index)
        return
    row.resume(checkpoint)
    metrics.RESUMES.inc()
    metrics.STEPS_SAVED.inc(checkpoint.num_done)
    log.info("image_resumed", job_id=row.active.job.id, image=row.index, step=checkpoint.num_done)


def time_lines(
    device: TickDevice, model: DiffusionModel, request: GenerationRequest, table: SamplerTable, encoded: EncodedPrompt
) -> tuple[Tensor, ...]:
    """The time embedding `[time_width]` of every evaluation of a job, computed once."""
    time_ids = model.time_ids(request.width, request.height)
    projection = model.unet.time_projection(
        device.upload(table.timesteps),
        pooled_prompt_embeds=encoded.pooled if time_ids is not None else None,
        time_ids=None if time_ids is None else device.upload(time_ids),
        guidance_embedding_scale=request.guidance_scale if model.embeds_guidance else None,
    )
    return projection.unbind()


def _by_model(jobs: list[ActiveJob]) -> dict[str, list[ActiveJob]]:
    grouped: dict[str, list[ActiveJob]] = {}
    for active in jobs:
        grouped.setdefault(active.job.request.model, []).append(active)
    return grouped
