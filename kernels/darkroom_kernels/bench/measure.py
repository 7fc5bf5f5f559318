"""Time a case in every way that runs here, and say of each how far it is from fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from darkroom_kernels.bench.cases import Case, Inputs, Way
from darkroom_kernels.bench.timing import Limits, num_input_sets, relative_error, time_calls

COMPILED = "compiled reference"


@dataclass(frozen=True)
class Result:
    """One way at one case. `share` is that of the device's limit; `error` is relative to fp32, root mean square.

    `reason` says why there are no figures, and is empty where there are.
    """

    way: str
    seconds: float = 0.0
    share: float = 0.0
    error: float = 0.0
    how: str = ""
    reason: str = ""


def drawing(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """Normal values in `dtype` on `device`: never zeros, which cost less power and hide errors."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)


@torch.inference_mode()
def measure_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    *,
    budget_s: float = 0.1,
    ways: tuple[str, ...] | None = None,
    compiled: bool = True,
) -> list[Result]:
    """Time `case` in each of `ways`, by default in all of them, and with `compiled` also its reference compiled."""
    first = case.make(drawing(device, dtype, 0))
    num_bytes = int(case.num_bytes)
    sets = [first, *(case.make(drawing(device, dtype, seed)) for seed in range(1, num_input_sets(num_bytes, device)))]
    # Copied before anything runs: some ways write in place.
    sample = _cloned(_first_row(first))
    expected = case.expected(_cloned(sample))
    wanted = {name: way for name, way in case.ways.items() if ways is None or name in ways}
    if compiled and case.is_compiled:
        wanted[COMPILED] = _compiled(case, dtype)
    floor_s = limits.floor_s(case.flops, case.num_bytes)
    results = []
    for name, way in wanted.items():
        # For the smaller sample the reference would be compiled once more; its digits are the uncompiled one's.
        judged = (lambda inputs: case.expected(inputs).to(dtype)) if name == COMPILED else way
        try:
            with _quiet():
                error = relative_error(judged(_cloned(sample)), expected)
                timing = time_calls([lambda i=i, w=way: w(i) for i in sets], device, budget_s=budget_s)  # type: ignore[misc]
        except Exception as failed:
            # Every way fails in its own class, and a missing package or an unsupported shape is an answer.
            if _is_fatal(failed):
                raise
            results.append(Result(name, reason=_one_line(failed)))
            continue
        results.append(Result(name, timing.seconds, floor_s / timing.seconds, error, timing.how))
    return results


def _compiled(case: Case, dtype: torch.dtype) -> Way:
    """The reference through torch.compile, rounded to the dtype that the others give."""
    torch._dynamo.reset()
    return torch.compile(lambda inputs: case.expected(inputs).to(dtype), dynamic=False)


def _first_row(inputs: Inputs) -> Inputs:
    """What the error is judged on: one row of pictures or tokens, all of a step. fp32 twins of a whole batch of
    attention scores would not fit.
    """
    if "slots" in inputs:
        return inputs
    batch = next(iter(inputs.values())).shape[0]
    return {name: value[:1] if _is_per_row(name, value, batch) else value for name, value in inputs.items()}


def _is_per_row(name: str, value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch and name != "weight"


def _cloned(inputs: Inputs) -> Inputs:
    """Copies with the same strides, for ways that write in place."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _is_fatal(error: Exception) -> bool:
    """Whether nothing more can be computed in this process: a lost device repeats its error when it is waited for."""
    if isinstance(error, torch.OutOfMemoryError) or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


@contextmanager
def _quiet() -> Iterator[None]:
    """A backend that cannot take a shape explains itself in warnings, one for each reason; the error says enough."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rate(case: Case, seconds: float) -> str:
    """TFLOP/s of products, TB/s of everything else."""
    if case.flops / max(case.num_bytes, 1.0) > 100:
        return f"{case.flops / seconds / 1e12:.3g} TFLOP/s"
    return f"{case.num_bytes / seconds / 1e12:.3g} TB/s"
