"""One picture alone: `python -m benchmarks.single_image [--rounds 15] [--record]`.

The three sides take turns inside each round, so a drift of the machine's speed meets all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from darkroom.config import BUILTIN_MODEL, load_settings
from darkroom.engine.local import generate_images
from darkroom.jobs import GenerationRequest
from darkroom.worker.main import load_models

from benchmarks.peers import Peer
from benchmarks.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()

    settings = load_settings()
    model = next(iter(load_models(settings, [BUILTIN_MODEL]).values()))
    request = GenerationRequest(
        prompt="a duck in a forest",
        model=model.id,
        width=model.card.width,
        height=model.card.height,
        num_inference_steps=arguments.steps,
        guidance_scale=5.0,
        seed=1,
        sampler="dpmpp_2m",
        sigma_schedule="simple",
    )
    plain = Peer(model.device, torch.float32, is_channels_last=False)
    tuned = Peer(model.device, model.dtype, is_channels_last=True)
    sides: dict[str, Callable[[], object]] = {
        "diffusers fp32": lambda: plain.draw(request),
        f"diffusers {str(model.dtype).removeprefix('torch.')} channels-last": lambda: tuned.draw(request),
        "darkroom": lambda: generate_images(model, request, settings),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(arguments.rounds + 2):
        for name, draw in sides.items():
            started = time.perf_counter()
            draw()
            if round_ >= 2:
                times[name].append(time.perf_counter() - started)

    names = list(sides)
    print(f"one image, {arguments.steps} steps with guidance, {model.dtype}, {torch.get_num_threads()} threads")
    for name in names:
        print(
            f"  {name:32s} median {statistics.median(times[name]) * 1e3:8.1f} ms   min {min(times[name]) * 1e3:8.1f} ms"
        )
    figures = [(f"single image, {name}", statistics.median(times[name]) * 1e3, "ms") for name in names]
    for name in names[:2]:
        ratios = [peer / ours for peer, ours in zip(times[name], times["darkroom"], strict=True)]
        print(f"  {statistics.median(ratios):.2f}x as fast as {name}")
        figures.append((f"single image, darkroom over {name}", statistics.median(ratios), "x"))
    if arguments.record:
        record(figures, "diffusers")


if __name__ == "__main__":
    main()
