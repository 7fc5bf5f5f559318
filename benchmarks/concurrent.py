"""Sixteen requests at once: `python -m benchmarks.concurrent [--requests 16] [--rounds 3] [--record]`.

Mixed steps (8–30), samplers and guidance on or off. diffusers serves them one by one in order of arrival, as a plain
server around a pipeline does; Darkroom's engine runs them step by step together. All arrive at time zero.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from darkroom.config import BUILTIN_MODEL, Settings, load_settings
from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.engine import Engine
from darkroom.engine.events import Event, Finished
from darkroom.jobs import GenerationRequest, Job
from darkroom.worker.main import load_models

from benchmarks.peers import SCHEDULERS, Peer
from benchmarks.record import record


def mixed_requests(model: DiffusionModel, count: int) -> list[GenerationRequest]:
    """A fixed mix: every sampler, 8 to 30 steps, guidance off for every fourth."""
    samplers, steps = list(SCHEDULERS), (8, 12, 16, 20, 25, 30)
    prompts = ("a duck in a forest", "an astronaut at night", "a cat left of a dog", "a house on a beach")
    return [
        GenerationRequest(
            prompt=prompts[i % len(prompts)],
            model=model.id,
            width=model.card.width,
            height=model.card.height,
            num_inference_steps=steps[(5 * i) % len(steps)],
            guidance_scale=1.0 if i % 4 == 3 else 4.0 + i % 3,
            seed=i,
            sampler=samplers[i % len(samplers)],
            sigma_schedule="simple",
        )
        for i in range(count)
    ]


def serve_one_by_one(peer: Peer, requests: list[GenerationRequest]) -> list[float]:
    """Latency of each request in seconds, all submitted at time zero."""
    started = time.perf_counter()
    latencies = []
    for request in requests:
        peer.draw(request)
        latencies.append(time.perf_counter() - started)
    return latencies


def serve_together(model: DiffusionModel, settings: Settings, requests: list[GenerationRequest]) -> list[float]:
    """The same through Darkroom's engine, decoded and compressed."""
    latencies: list[float] = []
    started = time.perf_counter()

    def on_event(event: Event) -> None:
        assert isinstance(event, Finished), event
        latencies.append(time.perf_counter() - started)
        if len(latencies) == len(requests):
            engine.stop()

    engine = Engine({model.id: model}, settings, on_event=on_event)
    for i, request in enumerate(requests):
        engine.submit(Job(id=str(i), request=request))
    engine.run()
    return latencies


def p95(latencies: list[float]) -> float:
    return statistics.quantiles(latencies, n=20, method="inclusive")[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()

    settings = load_settings()
    model = next(iter(load_models(settings, [BUILTIN_MODEL]).values()))
    requests = mixed_requests(model, arguments.requests)
    plain, tuned = (
        Peer(model.device, torch.float32, is_channels_last=False),
        Peer(model.device, model.dtype, is_channels_last=True),
    )
    sides = {
        "diffusers fp32": lambda: serve_one_by_one(plain, requests),
        f"diffusers {str(model.dtype).removeprefix('torch.')} channels-last": lambda: serve_one_by_one(tuned, requests),
        "darkroom": lambda: serve_together(model, settings, requests),
    }
    runs: dict[str, list[list[float]]] = {name: [] for name in sides}
    for round_ in range(arguments.rounds + 1):
        for name, serve in sides.items():
            latencies = serve()
            if round_:
                runs[name].append(latencies)

    figures = []
    print(f"{arguments.requests} concurrent requests, mixed steps, samplers and guidance, {model.dtype}")
    rate = {name: [len(run) / max(run) for run in runs[name]] for name in sides}
    tail = {name: [p95(run) for run in runs[name]] for name in sides}
    for name in sides:
        images_s, p95_s = statistics.median(rate[name]), statistics.median(tail[name])
        print(f"  {name:32s} {images_s:7.2f} images/s   p95 {p95_s:7.2f} s")
        figures += [(f"concurrent, {name}", images_s, "images/s"), (f"concurrent, {name}, p95", p95_s, "s")]
    for name in list(sides)[:2]:
        faster = statistics.median(ours / peer for ours, peer in zip(rate["darkroom"], rate[name], strict=True))
        shorter = statistics.median(ours / peer for ours, peer in zip(tail["darkroom"], tail[name], strict=True))
        print(f"  {faster:.2f}x the images/s of {name}, p95 {shorter:.2f} of its")
        figures += [
            (f"concurrent, images/s over {name}", faster, "x"),
            (f"concurrent, p95 over {name}", shorter, "x"),
        ]
    if arguments.record:
        record(figures, "diffusers")


if __name__ == "__main__":
    main()
