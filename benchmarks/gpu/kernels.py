"""Every kernel at every shape, against what PyTorch and other packages offer there."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch
from darkroom_kernels.bench.cases import NETWORKS, OPS, SD15, SDXL, TOY, Case, cases
from darkroom_kernels.bench.measure import measure_case, rate
from darkroom_kernels.bench.timing import measure_limits

from benchmarks.gpu.sections import Item, Measured, table
from benchmarks.record import Figure

AUTO = "darkroom auto"


class KernelsSection:
    """fp16 on CUDA; on a CPU toy shapes in fp32, which test the benchmark and measure nothing."""

    name = "kernels"

    def __init__(self, device: torch.device, *, quick: bool = False) -> None:
        self.device, self.quick = device, quick
        self.is_toy = device.type == "cpu"
        self.dtype = torch.float32 if self.is_toy else torch.float16

    def resume(self, found: dict[str, dict[str, Any]]) -> None:
        """Items are independent; the limits are measured anew by each process."""

    def close(self) -> None:
        """Nothing is held between items."""

    def items(self) -> Iterable[Item]:
        for case in self._cases():
            yield Item(case.name, lambda c=case: self._measure(c), expected_s=8.0)

    def _cases(self) -> Iterable[Case]:
        if self.is_toy:
            return cases((TOY,), (2,), itemsize=4)
        if self.quick:
            # The largest of each kind; the norms have too many widths to measure in a moment.
            chosen: dict[tuple[str, str], Case] = {}
            for case in cases((SD15, SDXL), (16,)):
                known = chosen.get((case.op, case.network))
                if known is None or case.num_bytes > known.num_bytes:
                    chosen[case.op, case.network] = case
            return chosen.values()
        return cases(NETWORKS, (2, 16))

    def _measure(self, case: Case) -> Measured:
        limits = measure_limits(self.device, self.dtype)
        results = measure_case(
            case,
            self.device,
            self.dtype,
            limits,
            budget_s=0.02 if self.is_toy else 0.05 if self.quick else 0.1,
            compiled=not (self.quick or self.is_toy),
        )
        dtype = str(self.dtype).removeprefix("torch.")
        figures, ways = [], {}
        for result in results:
            if result.reason:
                ways[result.way] = {"reason": result.reason}
                continue
            speed = rate(case, result.seconds)
            ways[result.way] = {
                "us": result.seconds * 1e6,
                "rate": speed,
                "share": result.share,
                "error": result.error,
                "how": result.how,
            }
            figures.append(
                Figure(
                    f"kernel {case.name}, {dtype}, {result.way}",
                    result.seconds * 1e6,
                    "us",
                    f"relative error {result.error:.2e}",
                    f"{speed}, {result.share:.3f} of the limit, timed by {result.how}",
                )
            )
        data = {"op": case.op, "network": case.network, "shape": case.shape, "rows": case.rows, "ways": ways}
        return Measured(figures, data)

    def report(self, found: dict[str, dict[str, Any]], reasons: dict[str, str]) -> str:
        rows: list[tuple[str, ...]] = [
            ("kernel", "model", "shape", "rows", "way", "µs", "rate", "of limit", "error", "auto is")
        ]
        unavailable: dict[str, str] = {}
        for data in found.values():
            ways = data["ways"]
            auto_us = ways.get(AUTO, {}).get("us")
            for name, way in ways.items():
                if "reason" in way:
                    unavailable.setdefault(f"{data['op']}, {name}", way["reason"])
                    continue
                ratio = f"{way['us'] / auto_us:.2f}x" if auto_us and not name.startswith("darkroom") else "-"
                rows.append(
                    (
                        data["op"],
                        data["network"],
                        data["shape"],
                        str(data["rows"]),
                        name,
                        f"{way['us']:.1f}",
                        way["rate"],
                        f"{way['share']:.2f}",
                        f"{way['error']:.1e}",
                        ratio,
                    )
                )
        lines = [table(rows)] if len(rows) > 1 else []
        lines += [f"not here: {name}: {reason}" for name, reason in unavailable.items()]
        return "\n".join([*lines, *summary(found)])


def summary(found: dict[str, dict[str, Any]]) -> list[str]:
    """Of each kernel, how the automatic choice compares with the best of the others: least and median over shapes."""
    lines = []
    for op in OPS:
        ratios: list[tuple[float, str]] = []
        for name, data in found.items():
            if data["op"] != op:
                continue
            others = [w["us"] for way, w in data["ways"].items() if not way.startswith("darkroom") and "us" in w]
            if others and "us" in data["ways"].get(AUTO, {}):
                ratios.append((min(others) / data["ways"][AUTO]["us"], name))
        if ratios:
            least, where = min(ratios)
            middle = statistics.median(ratio for ratio, _ in ratios)
            lines.append(f"{op}: auto is {middle:.2f}x the best other (median), {least:.2f}x at worst ({where})")
    return lines
