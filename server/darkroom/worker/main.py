"""The worker process: load models, warm up, serve until told to stop."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
import torch

from darkroom import metrics, tracing
from darkroom.config import Settings, builtin_models
from darkroom.diffusion.loader import DiffusionModel, load_model, measure_checkpoint, read_card
from darkroom.diffusion.memory import GIB, ModelMemory, Needed, check_memory
from darkroom.engine.engine import Engine
from darkroom.engine.threads import use_cpu_threads
from darkroom.errors import ConfigError, QueueUnavailable
from darkroom.garbage import spare_what_is_there
from darkroom.jobs import ModelCard
from darkroom.queue import JobQueue
from darkroom.worker.compile import check_compile, prepare_compile
from darkroom.worker.gpu import watch_gpu
from darkroom.worker.worker import Worker

log = structlog.get_logger("darkroom.worker")

# What is left of the time that `darkroom up` grants a worker to end.
LAST_SPANS_S = 0.4
# Row counts of `memory_table`: the buckets that graphs are captured for.
TABLE_ROWS = (1, 2, 4, 8, 16, 32)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """The device of a setting; `auto` takes the first visible GPU. Raises `ConfigError` when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"DARKROOM_DEVICE={name}: torch {torch.__version__} sees no CUDA device here")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"DARKROOM_DEVICE={name}: expected an index below {torch.cuda.device_count()}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a setting; `auto` is fp16 on a GPU, bf16 on a CPU with bf16 matrix units, else fp32."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.float16
    # The same question that torch itself asks before it picks bf16 kernels.
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def chosen_vae_dtype(settings: Settings, device: torch.device) -> torch.dtype | None:
    """The dtype of the autoencoder; None leaves it to the loader, which knows the model.

    One that overflows in fp16 is replaced while it serves, and pictures change with that; reproducible ones must not.
    """
    if settings.vae_dtype == "auto" and settings.batching == "reproducible" and device.type == "cuda":
        return torch.float32
    return _DTYPES.get(settings.vae_dtype)


def load_models(settings: Settings, paths: Sequence[str | Path]) -> dict[str, DiffusionModel]:
    """Load the models of `paths`. Raises `ModelError`, `ConfigError`."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if device.type == "cuda" and dtype is torch.float32:
        # torch computes convolutions of fp32 in TF32, with the digits of fp16, unless told otherwise.
        torch.backends.cudnn.allow_tf32 = False
    models: dict[str, DiffusionModel] = {}
    for path in paths:
        started_s = time.monotonic()
        model = load_model(
            path,
            device=str(device),
            dtype=dtype,
            attention=settings.attention,
            kernels=settings.kernels,
            vae_dtype=chosen_vae_dtype(settings, device),
            vae_tile_px=settings.vae_tile_px,
        )
        if model.id in models:
            raise ConfigError(f"--model: two models are called {model.id!r}: {models[model.id].path} and {model.path}")
        models[model.id] = model
        metrics.MODEL_LOAD_SECONDS.labels(model.id).set(time.monotonic() - started_s)
    return models


def read_cards(paths: Sequence[str | Path]) -> list[ModelCard]:
    """What the models of `paths` would be served as, without loading them. Raises `ModelError`."""
    return [read_card(path) for path in paths]


def measure_models(settings: Settings, paths: Sequence[str | Path]) -> list[ModelMemory]:
    """What each model will take on a GPU with these settings, from its configs. Raises `ModelError`."""
    return [
        measure_checkpoint(
            path,
            dtype=_DTYPES.get(settings.dtype, torch.float16),
            vae_dtype=chosen_vae_dtype(settings, torch.device("cuda")),
            vae_tile_px=settings.vae_tile_px,
            kernels=settings.kernels,
            sizes_px=settings.graph_sizes_px,
        )
        for path in paths
    ]


def check_that_models_fit(settings: Settings, paths: Sequence[str | Path], free_bytes: int) -> None:
    """Raise `ConfigError`, with numbers, when the models together do not fit into `free_bytes` of GPU memory."""
    is_reproducible = settings.batching == "reproducible"
    rows = settings.reproducible_rows if is_reproducible else settings.max_rows
    needed = check_memory(
        measure_models(settings, paths),
        rows=rows,
        rows_setting="DARKROOM_REPRODUCIBLE_ROWS" if is_reproducible else "DARKROOM_MAX_ROWS",
        prompt_cache_bytes=settings.prompt_cache_bytes,
        budget_bytes=settings.memory_budget_bytes,
        free_bytes=free_bytes,
    )
    log.info("memory_planned", needed_bytes=needed.total(rows), weights_bytes=needed.weights, free_bytes=free_bytes)


def memory_table(settings: Settings, paths: Sequence[str | Path]) -> list[tuple[str, ...]]:
    """GiB of GPU memory that each model would take alone, by model rows in a tick, as rows of a table with its head."""
    table = [("MODEL", "WEIGHTS", *(f"{rows} ROWS" for rows in TABLE_ROWS))]
    for model in measure_models(settings, paths):
        needed = Needed.by([model], settings.prompt_cache_bytes)
        totals = [needed.weights, *map(needed.total, TABLE_ROWS)]
        table.append((model.name, *(f"{total / GIB:.1f}" for total in totals)))
    return table


def run_worker(
    settings: Settings,
    redis_url: str,
    model_paths: Sequence[str | Path] = (),
    *,
    on_ready: Callable[[dict[str, object]], None] | None = None,
) -> None:
    """Serve `model_paths`, by default all built-in models, until SIGTERM or SIGINT.

    `on_ready` gets the worker's id, models and metrics port. `/health/ready` beside the metrics answers 200 from then
    until the drain begins.

    Raises `ConfigError` and `ModelError` before anything is claimed.
    """
    tracing.configure(settings, "darkroom-worker")
    device = choose_device(settings.device)
    check_compile(settings, device)
    model_paths = model_paths or builtin_models()
    use_cpu_threads(1)
    if device.type == "cuda":
        check_that_models_fit(settings, model_paths, torch.cuda.mem_get_info(device)[0])
    JobQueue(settings, redis_url)  # an unusable URL or result store stops the start before models are loaded
    models = load_models(settings, model_paths)
    metrics.export_only("worker")
    if device.type == "cuda":
        watch_gpu(device)
    is_ready = threading.Event()
    metrics_port = metrics.serve_metrics(settings.metrics_host, settings.metrics_port, is_ready.is_set)
    asyncio.run(_serve(settings, redis_url, models, metrics_port, is_ready, on_ready))
    tracing.shutdown(LAST_SPANS_S)


async def _serve(
    settings: Settings,
    redis_url: str,
    models: dict[str, DiffusionModel],
    metrics_port: int,
    is_ready: threading.Event,
    on_ready: Callable[[dict[str, object]], None] | None,
) -> None:
    queue = await _connect(settings, redis_url)
    compile_on_ready = prepare_compile(models.values(), settings)
    try:
        await queue.check_result_store()
        worker = Worker(settings, queue, functools.partial(Engine, models, settings, warm_up=True))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _drain_or_exit, worker, is_ready)

        def ready() -> None:
            spare_what_is_there()
            if not worker.is_draining:
                is_ready.set()
            compile_on_ready()
            log.info("metrics", url=f"http://{settings.metrics_host}:{metrics_port}/metrics")
            if on_ready is not None:
                on_ready({"worker": worker.id, "models": sorted(models), "metrics_port": metrics_port})

        await worker.run(ready)
    finally:
        await queue.close()


async def _connect(settings: Settings, redis_url: str) -> JobQueue:
    """Connect, however long Redis takes to appear. Ctrl-C still ends the process: no handler is installed yet."""
    while True:
        try:
            return await JobQueue.connect(settings, redis_url)
        except QueueUnavailable as error:
            log.warning("queue_unavailable", reason=str(error), retry_in_s=error.retry_after_s)
            await asyncio.sleep(error.retry_after_s)


def _drain_or_exit(worker: Worker, is_ready: threading.Event) -> None:
    """The first signal drains, a second one ends the process at once."""
    if worker.is_draining:
        os._exit(130)
    is_ready.clear()
    worker.drain()
