"""`darkroom bench kernels`: a table that can be read without knowing the kernels, and the tuning of attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from darkroom_kernels.attention.tiles import TABLE
from darkroom_kernels.attention.tuning import Size, tune
from darkroom_kernels.bench.cases import NETWORKS, SDXL, TOY, Case, Network, cases
from darkroom_kernels.bench.measure import Result, measure_case, rate
from darkroom_kernels.bench.timing import measure_limits, time_calls

TUNED_ROWS = 16
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


def tune_attention(
    device: torch.device, *, quick: bool, time_limit_s: float, say: Callable[[str], None], path: Path = TABLE
) -> None:
    """Try every candidate tile at every attention shape, and rewrite this kind of device's rows of the table.

    What is not reached within `time_limit_s` keeps the rows of the device's class.
    """
    began_s = time.monotonic()

    def in_time() -> Iterator[Size]:
        for number, size in enumerate(sizes_to_tune((SDXL,) if quick else NETWORKS)):
            if number and time.monotonic() - began_s > time_limit_s:
                say(f"stopped at the time limit, after {number} shapes")
                return
            say(f"{time.monotonic() - began_s:5.0f} s  {size}")
            yield size

    for row in tune(in_time(), device, torch.float16, lambda call: _seconds(call, device), path):
        times = ", ".join(f"{name} {us:.1f} µs" for name, us in row.times_us.items())
        say(f"head size {row.max_head_dim}, {row.max_queries} queries, {row.max_keys} keys: {row.winner} ({times})")
    say(f"wrote {path}")


def sizes_to_tune(networks: tuple[Network, ...]) -> Iterator[Size]:
    """Self-attention of each level and attention to texts of one chunk and of two, 16 model rows, every size once."""
    known = set()
    for network in networks:
        for level, heads in network.heads.items():
            tokens, dim = network.level_side(level) ** 2, network.channels[level] // heads
            for num_keys in (tokens, network.num_keys, 2 * network.num_keys):
                if (dim, tokens, num_keys) not in known:
                    known.add((dim, tokens, num_keys))
                    yield Size(TUNED_ROWS, heads, dim, tokens, num_keys, has_slots=num_keys != tokens)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    return time_calls([call], device, budget_s=0.03).seconds
