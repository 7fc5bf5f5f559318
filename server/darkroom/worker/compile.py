"""`DARKROOM_COMPILE=on`: the UNet is handed to torch's compiler while the hand-made path serves.

On a CPU a child process compiles, at the lowest priority: in this one the compiler would hold Python's lock and stop
the ticks. The child also compares the result with the hand-made path, and measures both. When it agrees and is faster,
it takes over from one tick to the next. On CUDA the compiled graphs are made, compared and measured bucket by bucket in
the warm-up, before ticks are captured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import structlog
import torch

from darkroom.config import Settings
from darkroom.diffusion.compiled import CompiledGraphs, Library, compiler_problem
from darkroom.diffusion.loader import DiffusionModel
from darkroom.errors import ConfigError
from darkroom.jobs import ModelCard

log = structlog.get_logger("darkroom.worker")


class CompileOrder(msgspec.Struct, frozen=True):
    """What the child is told. Sizes are in latent pixels, `length` in tokens."""

    directory: str
    dtype: str
    attention: str
    library: str
    height: int
    width: int
    length: int
    max_rows: int
    num_threads: int

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("height", "width", "length", "max_rows")}


class CompileReport(msgspec.Struct, frozen=True):
    """What the child found. `difference` from the hand-made path is relative to its largest output; `speedup` is over
    it, with the two rows of one guided picture.
    """

    seconds: float
    difference: float
    is_close: bool
    speedup: float


def check_compile(settings: Settings, device: torch.device) -> None:
    """Refuse at start what cannot work. Raises `ConfigError`."""
    if settings.compile == "off":
        return
    if settings.batching == "reproducible":
        raise ConfigError(
            "DARKROOM_COMPILE=on does not go with DARKROOM_BATCHING=reproducible: pictures before and after the "
            "compiled network takes over differ in their last bits"
        )
    if device.type == "cuda" and settings.graphs == "off":
        raise ConfigError(
            "DARKROOM_COMPILE=on does not go with DARKROOM_GRAPHS=off on a GPU: what is compiled are the ticks that "
            "are captured"
        )
    problem = compiler_problem() if device.type == "cpu" else None
    if problem is not None:
        raise ConfigError(f"DARKROOM_COMPILE=on: {problem}")


def prepare_compile(models: Iterable[DiffusionModel], settings: Settings) -> Callable[[], None]:
    """Before the warm-up: on CUDA, let it compile what it captures. Returns what to do when it is over."""
    models = list(models)
    if settings.compile == "off":
        return lambda: None
    graphs = []
    for model in models:
        if model.device.type == "cuda":
            graphs.append(CompiledGraphs(model.unet))
            model.unet.compiled = graphs[-1]

    def warm() -> None:
        for compiled in graphs:
            compiled.close()
        compile_in_background([model for model in models if model.device.type == "cpu"], settings)

    return warm


def order_for(model: DiffusionModel, settings: Settings, library: Path) -> CompileOrder:
    """The order for a model's own picture size."""
    card: ModelCard = model.card
    return CompileOrder(
        directory=str(model.path),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=settings.attention,
        library=str(library),
        height=card.height // model.vae_scale_factor,
        width=card.width // model.vae_scale_factor,
        length=model.text.max_tokens,
        max_rows=settings.max_rows,
        num_threads=settings.num_threads or len(os.sched_getaffinity(0)),
    )


def run_child(order: CompileOrder) -> CompileReport:
    """Compile in a child process. Raises `RuntimeError` with its last line when it fails."""
    command = [sys.executable, "-m", "darkroom.worker.compile_child", msgspec.json.encode(order).decode()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(order.num_threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    messages = Path(order.library).with_suffix(".log")
    # The child ends when its standard input does, and that is when this process ends, however it ends.
    with (
        messages.open("w") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
        ) as child,
    ):
        assert child.stdout is not None  # noqa: S101
        said = child.stdout.read()
        status = child.wait()
    if status:
        lines = messages.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        raise RuntimeError(f"the compiling process ended with status {status}: {last[:300]}")
    return msgspec.json.decode(said.strip().splitlines()[-1], type=CompileReport)


def take_over(
    model: DiffusionModel, settings: Settings, build: Callable[[CompileOrder], CompileReport] = run_child
) -> bool:
    """Compile a model's UNet with `build` and let it take over from the next tick on. Returns whether it did."""
    with tempfile.TemporaryDirectory(prefix="darkroom-compile-") as directory:
        order = order_for(model, settings, Path(directory) / "unet.so")
        report = build(order)
        told = {
            "model": model.id,
            "seconds": round(report.seconds),
            "speedup": round(report.speedup, 2),
            "difference": float(f"{report.difference:.1e}"),
        }
        if not report.is_close or report.speedup <= 1.0:
            log.info("compiled_network_not_used", **told)
            return False
        # Once it is mapped into memory, its file may go.
        model.unet.compiled = Library(Path(order.library), **order.sizes)
    log.info("compiled_network_in_use", **told, height=model.card.height, width=model.card.width)
    return True


def compile_in_background(
    models: Iterable[DiffusionModel],
    settings: Settings,
    build: Callable[[CompileOrder], CompileReport] = run_child,
) -> threading.Thread:
    """Compile one model after the other on a thread that never fails: what goes wrong is logged, and jobs go on."""

    def run() -> None:
        for model in models:
            try:
                take_over(model, settings, build)
            except Exception as error:
                log.warning("compile_failed", model=model.id, reason=f"{error}"[:500])

    thread = threading.Thread(target=run, name="compile", daemon=True)
    thread.start()
    return thread
