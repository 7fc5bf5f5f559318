"""From a job to its rows: what it asks of the text encoder, its compiled table, its first noise."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
import torch
from torch import Tensor

from darkroom import metrics
from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.samplers import SamplerTable, compile_sampler
from darkroom.engine.batcher import BatchKey
from darkroom.engine.checkpoint import unpack
from darkroom.engine.device import TickDevice
from darkroom.engine.prompts import EncodedPrompt, Prompt
from darkroom.engine.row import ActiveJob, Conditioning, Row
from darkroom.jobs import GenerationRequest, Job

log = structlog.get_logger("darkroom.engine")


def key_of(model: DiffusionModel, width: int, height: int) -> BatchKey:
    """The batch key of pictures of `width` × `height` pixels."""
    return BatchKey(model.id, height // model.vae_scale_factor, width // model.vae_scale_factor)


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
    device: TickDevice, model: DiffusionModel, active: ActiveJob, encoded: Mapping[Prompt, EncodedPrompt], now_s: float
) -> list[Row]:
    """Rows of a job, at step 0 or where a checkpoint says: compiled table, first noise from each row's own seed,
    conditioning for every step."""
    request = active.job.request
    table = compile_sampler(request.sampler, model.schedule, request.num_inference_steps, request.sigma_schedule)
    prompts = [encoded[prompt] for prompt in prompts_of(model, active.job)]
    lines = [time_lines(device, model, request, table, prompts[0])]
    # Where the text has no say in it, both model rows are at the same time.
    for prompt in prompts[1:]:
        lines.append(lines[0] if prompt.pooled is None else time_lines(device, model, request, table, prompt))
    conditionings = tuple(map(Conditioning, prompts, lines))
    key = key_of(model, request.width, request.height)
    shape = (model.latent_channels, key.height, key.width)
    rows = []
    for index in range(request.num_images_per_prompt):
        generator = torch.Generator().manual_seed(request.seed + index)
        row = Row(
            active=active,
            model=model,
            key=key,
            index=index,
            seed=request.seed + index,
            table=table,
            generator=generator,
            shape=shape,
            first_latents=torch.randn(shape, generator=generator, dtype=torch.float32) * table.initial_scale,
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
