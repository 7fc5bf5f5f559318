"""`darkroom bench kernels`: a table that can be read without knowing the kernels, and the tuning of the tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from darkroom_kernels.attention.tiles import TABLE
from darkroom_kernels.attention.tuning import Size, tune
from darkroom_kernels.backend import forget_decisions
from darkroom_kernels.bench.cases import NETWORKS, SDXL, TOY, Case, Network, cases
from darkroom_kernels.bench.measure import Result, measure_case, rate
from darkroom_kernels.bench.timing import measure_limits, time_calls
from darkroom_kernels.devices import device_kinds
from darkroom_kernels.winners import TABLE as WINNERS
from darkroom_kernels.winners import Row, save_winners

TUNED_ROWS = 16
AUTO = "darkroom auto"
# A relative error that no rounding of fp16 explains.
WRONG = 2e-2
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
    auto = next((result for result in measured if result.way == AUTO), None)
    others = [result for result in measured if not result.way.startswith("darkroom")]
    best = min(others, key=lambda result: result.seconds, default=None)
    head = (case.op, f"{case.network}: {case.shape}"[:44], str(case.rows))
    if auto is None:
        reason = next((result.reason for result in results if result.way == AUTO), "not measured")
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


def tune_kernels(
    device: torch.device,
    *,
    quick: bool,
    time_limit_s: float,
    say: Callable[[str], None],
    networks: tuple[Network, ...] = NETWORKS,
    path: Path = WINNERS,
) -> None:
    """Time every form of the kernels beside attention at every shape, and rewrite this kind of device's winners.

    Shapes of one size, as the table counts it, are one row with the sum of their times. A form that is wrong or cannot
    run is left out. A kernel that is not reached within `time_limit_s` keeps its rows.
    """
    began_s = time.monotonic()
    dtype = torch.float16
    limits = measure_limits(device, dtype)
    for op in dict.fromkeys(case.op for case in _with_winners(networks)):
        sums: dict[int, dict[str, float]] = {}
        for case in _with_winners((SDXL,) if quick else networks):
            if case.op != op:
                continue
            if time.monotonic() - began_s > time_limit_s:
                say(f"stopped at the time limit, before {case.name}")
                return
            forms = [way for way in case.ways if way != AUTO]
            results = measure_case(case, device, dtype, limits, budget_s=0.03, ways=tuple(forms), compiled=False)
            right = {result.way: result.seconds for result in results if not result.reason and result.error < WRONG}
            total = sums.setdefault(case.size, dict.fromkeys(right, 0.0))
            # Only what ran at all shapes of a size can be compared.
            sums[case.size] = {way: total[way] + 1e6 * right[way] for way in total if way in right}
        rows = [
            Row(size, {way.removeprefix("darkroom "): round(us, 2) for way, us in times.items()})
            for size, times in sums.items()
            if times
        ]
        save_winners(device_kinds(device)[0], op, rows, path)
        forget_decisions()
        for row in rows:
            times = ", ".join(f"{name} {us:.1f} µs" for name, us in row.times_us.items())
            say(f"{op}, size {row.size}: {row.winner} ({times})")
    say(f"wrote {path}")


def _with_winners(networks: tuple[Network, ...]) -> Iterator[Case]:
    return (case for case in cases(networks, (TUNED_ROWS,)) if case.size)


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
