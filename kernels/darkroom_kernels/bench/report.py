"""`darkroom bench kernels`: a table that can be read without knowing the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from darkroom_kernels.bench.cases import NETWORKS, SDXL, TOY, Case, cases
from darkroom_kernels.bench.measure import Result, measure_case, rate
from darkroom_kernels.bench.timing import measure_limits

HEAD = ("kernel", "shape", "rows", "µs", "speed", "of limit", "best other", "µs", "faster", "error")


def bench_kernels(device: torch.device, *, quick: bool, say: Callable[[str], None]) -> None:
    """Time every kernel on `device`, and print one line a shape as soon as it is known."""
    is_toy = device.type == "cpu"
    dtype = torch.float32 if is_toy else torch.float16
    limits = measure_limits(device, dtype)
    say(
        f"A large product reaches {limits.flops / 1e12:.4g} TFLOP/s here, a large copy {limits.bytes_per_s / 1e12:.4g} "
        'TB/s; "of limit" is the share of whichever binds.'
    )
    say('The first time is of what Darkroom takes by itself; "faster" compares it with the best of PyTorch and others.')
    say('"error" is relative to fp32, root mean square.')
    widths = (16, 44, 4, 9, 15, 8, 18, 9, 7, 7)
    say(_line(HEAD, widths))
    for case in _wanted(is_toy, quick):
        results = measure_case(case, device, dtype, limits, budget_s=0.02 if is_toy or quick else 0.1, compiled=False)
        say(_line(_cells(case, results), widths))


def _wanted(is_toy: bool, quick: bool) -> Iterator[Case]:
    if is_toy:
        return cases((TOY,), (2,), itemsize=4)
    return cases((SDXL,), (16,)) if quick else cases(NETWORKS, (2, 16))


def _line(cells: tuple[str, ...], widths: tuple[int, ...]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _cells(case: Case, results: list[Result]) -> tuple[str, ...]:
    measured = [result for result in results if not result.reason]
    auto = next((result for result in measured if result.way == "darkroom auto"), None)
    others = [result for result in measured if not result.way.startswith("darkroom")]
    best = min(others, key=lambda result: result.seconds, default=None)
    head = (case.op, f"{case.network}: {case.shape}"[:44], str(case.rows))
    if auto is None:
        reason = next((result.reason for result in results if result.way == "darkroom auto"), "not measured")
        return (*head, reason, "", "", "", "", "", "")
    return (
        *head,
        f"{auto.seconds * 1e6:.1f}",
        rate(case, auto.seconds),
        f"{auto.share:.2f}",
        best.way if best else "-",
        f"{best.seconds * 1e6:.1f}" if best else "-",
        f"{best.seconds / auto.seconds:.2f}x" if best else "-",
        f"{auto.error:.0e}",
    )
