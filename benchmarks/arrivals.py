"""Requests that arrive when they like: an open loop, so that a slow server is not spared."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

MIXED_STEPS = (8, 12, 16, 20, 25, 30, 40, 50)


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, and what it asks for."""

    at_s: float
    num_inference_steps: int
    seed: int


def poisson_trace(rate: float, window_s: float, seed: int = 0) -> list[Arrival]:
    """Arrivals of a Poisson process of `rate` per second within `window_s`, steps mixed from `MIXED_STEPS`.

    The same arguments give the same trace. Two rates give the same requests, closer together.
    """
    randomness, arrivals, at_s = random.Random(seed), [], 0.0
    while True:
        at_s += randomness.expovariate(1.0) / rate
        if at_s >= window_s:
            return arrivals
        arrivals.append(Arrival(at_s, randomness.choice(MIXED_STEPS), len(arrivals)))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed. Raises `ValueError` on no values."""
    if not values:
        raise ValueError("expected at least one value")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
