"""Is the fast path's picture the fp32 picture? `python -m benchmarks.quality [--device cpu] [--record]`.

The built-in model draws 20 seeds by every fast path: each fast dtype, the network through torch.compile, and on a GPU
each attention by name and the GEGLU of one kernel. The UNets of SD 1.5, SD 2.1 and SDXL do the same with random
weights, but for torch.compile (64 px on a CPU, where true sizes take minutes each; their true size on a GPU). Every
picture is compared with the one that the plainest fp32 path of the same device draws: PSNR in dB and SSIM, mean and
worst. The speed is in the same row.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from darkroom.config import BUILTIN_MODEL, Settings, load_settings
from darkroom.diffusion.compiled import CompiledGraphs, Library, compile_library, load_unet
from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.engine import Engine
from darkroom.engine.events import Event, Finished
from darkroom.errors import DarkroomError
from darkroom.jobs import GenerationRequest, Job
from darkroom.worker.compile import order_for
from darkroom.worker.main import choose_device, choose_dtype, load_models
from numpy.typing import NDArray
from PIL import Image

from benchmarks.families import FAMILIES, SDXL, Family, at_side, write_model
from benchmarks.record import Figure, device_name, record

NUM_SEEDS = 20
Picture = NDArray[np.uint8]
# Evaluations of a random network take as long as a trained one's; fewer steps keep the fp32 side within a minute.
NUM_STEPS = {SDXL.name: 5}
CPU_SIDE_PX = 64
# Attentions that a GPU may be told to take; sdpa is what auto leaves to torch.
ATTENTIONS = ("triton", "sdpa", "cudnn", "flash", "efficient", "xformers")
# Each bucket of a GPU is compiled by itself.
COMPILED_ROWS = 8


@dataclass(frozen=True)
class Quality:
    """Of some pictures against their fp32 twins: PSNR in dB (infinite when equal) and SSIM."""

    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...] | None

    def __str__(self) -> str:
        psnr = f"PSNR {statistics.fmean(self.psnr_db):.1f} dB (least {min(self.psnr_db):.1f})"
        ssim = "SSIM not measured: scikit-image is missing"
        if self.ssim is not None:
            ssim = f"SSIM {statistics.fmean(self.ssim):.4f} (least {min(self.ssim):.4f})"
        return f"{psnr}, {ssim}, {len(self.psnr_db)} seeds against fp32"


def psnr_db(picture: Picture, expected: Picture) -> float:
    """Peak signal-to-noise ratio of uint8 pictures; 100 when they are equal, so that means stay finite."""
    error = float(np.mean((picture.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return min(100.0, 10.0 * float(np.log10(255.0**2 / error))) if error else 100.0


def compare(pictures: Sequence[Picture], expected: Sequence[Picture]) -> Quality:
    """Compare pictures with their fp32 twins, one by one."""
    pairs = list(zip(pictures, expected, strict=True))
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        structural_similarity = None
    ssim = None
    if structural_similarity is not None:
        ssim = tuple(float(structural_similarity(a, b, channel_axis=2, data_range=255)) for a, b in pairs)
    return Quality(tuple(psnr_db(a, b) for a, b in pairs), ssim)


def draw(
    model: DiffusionModel,
    settings: Settings,
    num_steps: int,
    seeds: Sequence[int],
    on_ready: Callable[[], None] | None = None,
) -> tuple[list[Picture], float]:
    """Pictures of `seeds`, drawn together, and the seconds that took, without the first call's.

    `on_ready` is called between the warm-up and the first of them.
    """
    prompts = model.card.example_prompts or ["a duck in a forest"]
    requests = [
        GenerationRequest(
            prompt=prompts[seed % len(prompts)],
            model=model.id,
            width=model.card.width,
            height=model.card.height,
            num_inference_steps=num_steps,
            guidance_scale=5.0,
            seed=seed,
            sampler="euler",
            sigma_schedule="simple",
        )
        for seed in seeds
    ]
    pictures: dict[str, Picture] = {}
    began_s = 0.0

    def on_event(event: Event) -> None:
        nonlocal began_s
        if not isinstance(event, Finished):
            engine.stop()
        elif event.job.id == "first":
            began_s = time.perf_counter()
            for index, request in enumerate(requests):
                engine.submit(Job(id=str(index), request=request))
        else:
            pictures[event.job.id] = np.asarray(Image.open(io.BytesIO(event.images[0])).convert("RGB"))
            if len(pictures) == len(requests):
                engine.stop()

    engine = Engine({model.id: model}, settings, on_event=on_event, on_ready=on_ready, warm_up=True)
    engine.submit(Job(id="first", request=requests[0]))
    engine.run()
    if len(pictures) < len(requests):
        raise RuntimeError(f"{model.id}: a request failed after {len(pictures)} pictures")
    return [pictures[str(index)] for index in range(len(requests))], time.perf_counter() - began_s


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """cuDNN's convolutions without TF32, which torch allows them by default; products have none by default."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def plainest(settings: Settings) -> Settings:
    """fp32 throughout, PyTorch's operators, no graphs: what every fast path is held against."""
    on_gpu = choose_device(settings.device).type == "cuda"
    plain: dict[str, Any] = {
        "dtype": "fp32",
        "attention": "reference" if on_gpu else "sdpa",
        "kernels": "torch",
        "graphs": "off",
        "vae_dtype": "fp32",
        "compile": "off",
    }
    if on_gpu:
        # The reference holds all scores of a call at once.
        plain["max_rows"] = 4
    known = type(settings).model_fields
    return settings.model_copy(update={name: value for name, value in plain.items() if name in known})


def fast_dtypes(settings: Settings) -> tuple[str, ...]:
    """The dtypes below fp32 that are worth their name on this device."""
    device = choose_device(settings.device)
    if device.type == "cuda":
        return ("fp16", "bf16")
    return ("bf16",) if choose_dtype("auto", device) is torch.bfloat16 else ()


def fast_paths(settings: Settings, *, compiled: bool) -> list[tuple[str, Settings]]:
    """Every path that a worker may be told to take on this device, by name; with `compiled` torch.compile's too."""
    fast = fast_dtypes(settings)
    paths: list[tuple[str, dict[str, Any]]] = [(dtype, {"dtype": dtype}) for dtype in ("fp32", *fast)]
    if choose_device(settings.device).type == "cuda":
        half = {"dtype": "fp16"}
        paths += [(f"fp16, attention {name}", half | {"attention": name}) for name in ATTENTIONS]
        paths.append(("fp16, GEGLU of one kernel", half | {"kernels": "triton"}))
    if compiled:
        few = {"compile": "on", "max_rows": COMPILED_ROWS}
        paths += [(f"{dtype}, compiled", {"dtype": dtype, **few}) for dtype in ("fp32", *fast)]
    return [(label, settings.model_copy(update=changes)) for label, changes in paths]


def use_compiled(model: DiffusionModel, settings: Settings, scratch: Path) -> Callable[[], None]:
    """Let the compiled network draw whether or not it is faster. Returns what to call when the engine is ready."""
    if model.device.type == "cuda":
        faster = itertools.cycle((2.0, 1.0))
        graphs = model.unet.compiled = CompiledGraphs(model.unet, seconds_of=lambda *_: next(faster))
        return graphs.close
    order = order_for(model, settings, scratch / "unet.so")
    plain = load_unet(model.path, model.dtype, attention=order.attention, is_plain=True)
    compile_library(plain, scratch / "unet.so", **order.sizes)
    model.unet.compiled = Library(scratch / "unet.so", **order.sizes)
    return lambda: None


def measure(
    name: str, path: Path, settings: Settings, num_steps: int, *, compiled: bool, num_seeds: int = NUM_SEEDS
) -> list[Figure]:
    """The fp32 pictures of a checkpoint, then those of each fast path beside them. What cannot run says why."""
    seeds = range(num_seeds)
    plain = plainest(settings)
    with exact_fp32():
        expected, seconds = draw(_load(path, plain), plain, num_steps, seeds)
    figures = [_figure(name, num_steps, "plain fp32", num_seeds / seconds, "the measure")]
    for label, variant in fast_paths(settings, compiled=compiled):
        gc.collect()
        try:
            model = _load(path, variant)
            with tempfile.TemporaryDirectory(prefix="darkroom-quality-") as scratch:
                on_ready = use_compiled(model, variant, Path(scratch)) if variant.compile == "on" else None
                pictures, seconds = draw(model, variant, num_steps, seeds, on_ready)
        except (DarkroomError, RuntimeError) as error:
            print(f"quality, {name}, {label}: not measured: {str(error).splitlines()[0]}", flush=True)
            continue
        figures.append(_figure(name, num_steps, label, num_seeds / seconds, str(compare(pictures, expected))))
        del model
    return figures


def _load(path: Path, settings: Settings) -> DiffusionModel:
    return next(iter(load_models(settings, [path]).values()))


def _figure(name: str, num_steps: int, label: str, rate: float, quality: str) -> Figure:
    figure = Figure(f"quality, {name}, {num_steps} steps, {label}", rate, "images/s", quality)
    print(f"{figure.name:56s} {figure.value:8.3f} images/s   {quality}", flush=True)
    return figure


def size_for(family: Family, device: torch.device) -> Family:
    return family if device.type == "cuda" else at_side(family, CPU_SIDE_PX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES), help="random-weight UNets"
    )
    parser.add_argument("--without-compiled", action="store_true", help="save the minutes that torch.compile takes")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument(
        "--models-dir", type=Path, help="where the random checkpoints are kept (default: a temporary one)"
    )
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    settings = load_settings(device=arguments.device)
    device = choose_device(settings.device)
    figures = measure(
        "built-in 64 px",
        BUILTIN_MODEL,
        settings,
        20,
        compiled=not arguments.without_compiled,
        num_seeds=arguments.seeds,
    )
    with tempfile.TemporaryDirectory(prefix="darkroom-families-") as scratch:
        for name in arguments.families:
            family = size_for(FAMILIES[name], device)
            path = write_model(family, arguments.models_dir or Path(scratch), device)
            steps = NUM_STEPS.get(name, 20) if device.type == "cuda" else 4
            figures += measure(
                f"random weights {family.name}", path, settings, steps, compiled=False, num_seeds=arguments.seeds
            )
    if arguments.record:
        record(figures, "scikit-image", device=device_name(device.type))


if __name__ == "__main__":
    main()
