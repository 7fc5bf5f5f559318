"""Seconds of a call on its device, and what the device can do at most.

On CUDA the calls are captured into one graph and the graph is replayed, so that what is measured is the device's time
and not Python's; a tick of the engine is one graph too. What cannot be captured is timed eagerly between events. The
inputs rotate through sets larger than the L2 cache, as they would between the layers of a network.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_INPUT_SETS = 16
MAX_GRAPH_CALLS = 200
REPLAYS = 3
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, and how it was launched: `graph`, `events` or `wall`."""

    seconds: float
    how: str


@dataclass(frozen=True)
class Limits:
    """What a large matrix product and a large copy reach here: FLOP/s, and bytes per second read plus written."""

    flops: float
    bytes_per_s: float

    def floor_s(self, flops: float, num_bytes: float) -> float:
        """Least seconds for so much work, whichever of the two limits binds."""
        return max(flops / self.flops, num_bytes / self.bytes_per_s)


def l2_bytes(device: torch.device) -> int:
    """Bytes that may stay cached between two calls; a guess on a CPU."""
    if device.type != "cuda":
        return 32 << 20
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def num_input_sets(num_bytes: int, device: torch.device) -> int:
    """How many copies of inputs of `num_bytes` to rotate through, so that none is found in the cache."""
    return max(1, min(MAX_INPUT_SETS, -(-2 * l2_bytes(device) // max(num_bytes, 1))))


@torch.inference_mode()
def time_calls(calls: Sequence[Call], device: torch.device, *, budget_s: float = 0.1) -> Timing:
    """Time one call, taken in turn from `calls`, which do the same work on different inputs.

    `budget_s` is about how long to measure, warm-up and compilation not counted.
    """
    if device.type != "cuda":
        return _wall(calls, budget_s)
    with torch.cuda.device(device):
        for call in calls:
            call()
        once_s = max(_events(calls, 1) / len(calls), 1e-6)
        try:
            return _graph(calls, once_s, budget_s)
        except RuntimeError:
            # A call that synchronises cannot be captured; the error may only surface here.
            torch.cuda.synchronize()
        turns = max(1, round(budget_s / 5 / once_s / len(calls)))
        return Timing(statistics.median(_events(calls, turns) for _ in range(5)) / (turns * len(calls)), "events")


def time_replays(replay: Call, device: torch.device, *, turns: int = 20) -> float:
    """Median seconds of a captured graph, replays back to back."""
    with torch.cuda.device(device):
        return statistics.median(_events([replay], turns) for _ in range(5)) / turns


def _wall(calls: Sequence[Call], budget_s: float) -> Timing:
    for call in calls:
        call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < budget_s and len(times) < 1000):
        started = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - started)
    return Timing(statistics.median(times), "wall")


def _events(calls: Sequence[Call], turns: int) -> float:
    """Seconds between events around `turns` rounds of `calls`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(turns):
        for call in calls:
            call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _graph(calls: Sequence[Call], once_s: float, budget_s: float) -> Timing:
    turns = max(1, min(MAX_GRAPH_CALLS // len(calls), round(budget_s / 8 / once_s / len(calls))))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(turns):
            # Results live until all inputs had their turn: freed at once, every call would write to one place in L2.
            results = [call() for call in calls]
    del results
    graph.replay()
    # Several at a time: the first one's launch is part of what is measured.
    times = [_events([graph.replay], REPLAYS) / REPLAYS for _ in range(7)]
    graph.reset()
    return Timing(statistics.median(times) / (turns * len(calls)), "graph")


@functools.cache
def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure a large product in `dtype` and a large copy; random data, because zeros cost less power.

    A laptop's processor gets sizes that take it a moment.
    """
    on_gpu = device.type == "cuda"
    side, num_bytes = (8192, 2 << 30) if on_gpu else (512, 64 << 20)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = time_calls([lambda: torch.mm(a, b)], device, budget_s=0.5 if on_gpu else 0.1)
    source = torch.randn(num_bytes // 4, device=device, generator=generator)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device, budget_s=0.3 if on_gpu else 0.1)
    return Limits(2 * side**3 / product.seconds, 2 * num_bytes / copy.seconds)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; infinite when `actual` is not finite."""
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    error = float(difference / expected.double().square().mean().sqrt().clamp_min(1e-30))
    return error if error == error else float("inf")
