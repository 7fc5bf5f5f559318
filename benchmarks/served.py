"""The same jobs through a worker and a real redis-server, with something on and off in turn."""

from __future__ import annotations

import asyncio
import functools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from darkroom.config import BUILTIN_MODEL, Settings, load_settings
from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.engine import Engine
from darkroom.jobs import Job, JobState, new_job_id
from darkroom.queue import JobQueue
from darkroom.queue.embedded import EmbeddedRedis
from darkroom.worker.main import load_models
from darkroom.worker.worker import Worker

from benchmarks.concurrent import mixed_requests

# What happens beside a job from its acceptance to its end, given the address of the server.
Beside = Callable[[str, Job], Awaitable[Any]]


async def images_per_s(
    model: DiffusionModel, settings: Settings, url: str, *, jobs: int, steps: int, beside: Beside | None = None
) -> float:
    """Pictures that one worker makes in a second of `jobs` jobs of `steps` steps that are all there at the start."""
    queue = await JobQueue.connect(settings, url)
    # Ready as worker processes are: else the map for previews would be fitted while the pictures are timed.
    engine = functools.partial(Engine, {model.id: model}, settings, warm_up=True)
    ready, worker = asyncio.Event(), Worker(settings, queue, engine)
    serving = asyncio.create_task(worker.run(on_ready=ready.set))
    await ready.wait()
    try:
        requests = mixed_requests(model, jobs)
        began_s = time.perf_counter()
        waiting = []
        for request in requests:
            job = Job(id=new_job_id(), request=msgspec.structs.replace(request, num_inference_steps=steps))
            await queue.enqueue(job, result_bytes=1 << 20)
            waiting.append(queue.wait(job.id, 600))
            if beside is not None:
                waiting.append(beside(url, job))
        ends = await asyncio.gather(*waiting)
        took_s = time.perf_counter() - began_s
        assert all(end.state is JobState.SUCCEEDED for end in ends if end is not None)
    finally:
        worker.drain()
        await serving
        await queue.close()
    return jobs / took_s


def in_turn(
    sides: Mapping[str, tuple[Mapping[str, Any], Beside | None]], *, rounds: int, jobs: int, steps: int
) -> dict[str, list[float]]:
    """Images/s of each side (settings that differ from the defaults, what happens beside each job), a value a round.

    All sides run in each round, in an order that turns, after one round for nobody.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as directory:
        settings = load_settings(data_dir=Path(directory))
        (model,) = load_models(settings, [BUILTIN_MODEL]).values()
        with EmbeddedRedis(settings) as server:
            for round_ in range(rounds + 1):
                names = list(sides)
                for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                    changed, beside = sides[name]
                    run = images_per_s(
                        model, settings.model_copy(update=changed), server.url, jobs=jobs, steps=steps, beside=beside
                    )
                    rate = asyncio.run(run)
                    if round_:
                        rates[name].append(rate)
    return rates


def costs(without: list[float], with_: list[float]) -> tuple[float, float, float]:
    """Per cent of throughput that something costs: lower quartile, median and upper quartile of all rounds."""
    each = [100 * (1 - b / a) for a, b in zip(without, with_, strict=True)]
    if len(each) == 1:
        return each[0], each[0], each[0]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return low, middle, high
