"""Jobs and results for tests of the queue."""

from __future__ import annotations

from darkroom.jobs import (
    GenerationRequest,
    ImageInfo,
    Job,
    ModelCard,
    Priority,
    Result,
    Timings,
    new_job_id,
)
from darkroom.queue import JobQueue

MODEL = "tiny"


def make_job(
    *, priority: Priority = Priority.NORMAL, num_images: int = 1, guidance_scale: float = 1.0, model: str = MODEL
) -> Job:
    request = GenerationRequest(
        prompt="a red circle",
        model=model,
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        seed=7,
        sampler="ddim",
        sigma_schedule="simple",
        num_images_per_prompt=num_images,
    )
    return Job(id=new_job_id(), request=request, priority=priority)


def make_result(images: list[bytes], worker: str = "w1") -> Result:
    infos = [
        ImageInfo(index=index, seed=7 + index, format="png", width=64, height=64, num_bytes=len(image))
        for index, image in enumerate(images)
    ]
    return Result(images=infos, timings=Timings(), weights_hash="abc", worker=worker, max_batch_rows=2)


def make_card(model: str = MODEL) -> ModelCard:
    return ModelCard(
        id=model,
        family="sd1",
        weights_hash="abc",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=1.0,
        sampler="ddim",
        sigma_schedule="simple",
        samplers=["ddim"],
        sigma_schedules=["simple"],
        size_multiple=8,
        vae_scale_factor=4,
        max_width=64,
        max_height=64,
    )


async def end_lease(queue: JobQueue, job: Job) -> None:
    """Let a lease run out now, as if its time had passed while others reaped."""
    connection = queue._connection
    _, changed = await connection.transaction(
        ("SET", f"{connection.keys.prefix}looked_after", "1", "PX", 10_000),
        ("ZADD", f"{connection.keys.prefix}leases", "XX", "CH", 1, job.id),
    )
    assert changed == 1
