"""Step batching against request-level batching and one by one: Poisson arrivals, the same trace, the same engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.events import TickReport
from darkroom.jobs import GenerationRequest

from benchmarks.arrivals import MIXED_STEPS, Arrival, percentile, poisson_trace
from benchmarks.gpu.running import RunningEngine
from benchmarks.gpu.sections import Item, Measured, NotYet, table
from benchmarks.policies import POLICIES
from benchmarks.record import Figure

LOADS = (0.8, 0.5, 0.95)
# A point ends as overloaded when, after this share of its window, more than half of what came is not done.
OVERLOAD_AFTER = 0.25
OVERLOAD_LEAST_WAITING = 20
PERCENTILES = (0.5, 0.95, 0.99)


@dataclass
class Point:
    """What happened under one policy at one rate. A request that was still unfinished counts with its age so far."""

    latencies_s: list[float]
    num_unfinished: int
    elapsed_s: float
    ticks: list[TickReport]

    @property
    def images_per_s(self) -> float:
        return (len(self.latencies_s) - self.num_unfinished) / self.elapsed_s


def request_of(model: DiffusionModel, arrival: Arrival) -> GenerationRequest:
    """A guided picture of the model's own size, given out as JPEG: PNG would take the processor longer than the GPU."""
    return GenerationRequest(
        prompt="a duck in a forest",
        model=model.id,
        width=model.card.width,
        height=model.card.height,
        num_inference_steps=arrival.num_inference_steps,
        guidance_scale=5.0,
        seed=arrival.seed,
        sampler="euler",
        sigma_schedule="simple",
        output_format="jpeg",
    )


def play(running: RunningEngine, trace: list[Arrival], *, window_s: float, drain_s: float) -> Point:
    """Submit each request at its time, wait `drain_s` beyond the window, and cancel what is left by then."""
    began_s = running.begin()
    ids: list[str] = []
    is_overloaded = False
    for arrival in trace:
        time.sleep(max(0.0, began_s + arrival.at_s - time.monotonic()))
        ids.append(str(arrival.seed))
        running.submit(ids[-1], request_of(running.model, arrival))
        waiting = len(ids) - running.num_ended
        is_overloaded = arrival.at_s > OVERLOAD_AFTER * window_s and waiting > max(len(ids) / 2, OVERLOAD_LEAST_WAITING)
        if is_overloaded:
            break
    run = running.wait(ids, 0.0 if is_overloaded else began_s + window_s + drain_s - time.monotonic())
    num_unfinished = len(ids) - len(run.ended_s)
    elapsed_s = time.monotonic() - began_s if num_unfinished else run.last_s
    return Point(
        latencies_s=[run.ended_s.get(id_, elapsed_s) - arrival.at_s for id_, arrival in zip(ids, trace, strict=False)],
        num_unfinished=num_unfinished,
        elapsed_s=elapsed_s,
        ticks=[report for _, report in run.ticks],
    )


def measure_capacity(running: RunningEngine, count: int) -> float:
    """Images per second of step batching while its batch is full; `count` requests of the mix wait from the start."""
    running.use(POLICIES["step"](running.buckets))
    trace = [Arrival(0.0, MIXED_STEPS[index % len(MIXED_STEPS)], index) for index in range(count)]
    ticks = running.draw([request_of(running.model, arrival) for arrival in trace]).ticks
    full = max(report.num_rows for _, report in ticks)
    busy = [(ended_s, report.num_rows) for ended_s, report in ticks if report.num_rows >= 0.9 * full]
    mean_steps = sum(arrival.num_inference_steps for arrival in trace) / count
    return sum(rows for _, rows in busy) / mean_steps / max(ended_s for ended_s, _ in busy)


class BatchingSection:
    """`engine` makes the running engine when it is first needed; `count` requests measure the capacity."""

    name = "batching"

    def __init__(
        self,
        make_engine: Callable[[], RunningEngine],
        label: str,
        *,
        window_s: float = 60.0,
        loads: tuple[float, ...] = LOADS,
        policies: tuple[str, ...] = tuple(POLICIES),
        count: int = 96,
        plots: Path | None = None,
    ) -> None:
        self._make_engine, self._running = make_engine, None
        self.label, self.window_s, self.loads, self.policies = label, window_s, loads, policies
        self.count, self.plots = count, plots
        self._capacity = 0.0

    @property
    def running(self) -> RunningEngine:
        if self._running is None:
            self._running = self._make_engine()
            # First calls, graphs and clocks are not part of any point.
            self._running.draw([request_of(self._running.model, Arrival(0.0, 8, seed)) for seed in range(8)])
        return self._running

    def close(self) -> None:
        if self._running is not None:
            self._running.close()

    def items(self) -> Iterable[Item]:
        yield Item("capacity", self._measure_capacity, expected_s=30.0)
        for policy in self.policies:
            for load in self.loads:
                yield Item(
                    f"{policy} at {load}", lambda p=policy, x=load: self._measure_point(p, x), self.window_s + 10.0
                )

    def resume(self, found: dict[str, dict[str, Any]]) -> None:
        if "capacity" in found:
            self._capacity = float(found["capacity"]["images_per_s"])

    def _measure_capacity(self) -> Measured:
        self._capacity = measure_capacity(self.running, self.count)
        return Measured(
            [Figure(f"batching, {self.label}, capacity of step batching, mixed steps", self._capacity, "images/s")],
            {"images_per_s": self._capacity},
        )

    def _measure_point(self, policy: str, load: float) -> Measured:
        if not self._capacity:
            raise NotYet("the capacity, of which the loads are shares, is not measured")
        rate = load * self._capacity
        running = self.running
        running.use(POLICIES[policy](running.buckets))
        point = play(running, poisson_trace(rate, self.window_s), window_s=self.window_s, drain_s=self.window_s)
        rows_per_tick = statistics.fmean(report.num_rows for report in point.ticks)
        name = f"batching, {self.label}, {policy} at {load} of {self._capacity:.3g} images/s"
        detail = f"{rows_per_tick:.2f} rows per tick"
        if point.num_unfinished:
            detail += f", overloaded: {point.num_unfinished} of {len(point.latencies_s)} unfinished"
        figures = [
            Figure(f"{name}, p{round(100 * share)} latency", percentile(point.latencies_s, share), "s", "", detail)
            for share in PERCENTILES
        ]
        figures.append(Figure(f"{name}, throughput", point.images_per_s, "images/s", "", detail))
        return Measured(
            figures,
            {
                "policy": policy,
                "load": load,
                "latencies_s": [round(latency, 5) for latency in point.latencies_s],
                "num_unfinished": point.num_unfinished,
                "images_per_s": point.images_per_s,
                "rows_per_tick": rows_per_tick,
                "tick_ms": tick_times_ms(point.ticks),
            },
        )

    def report(self, found: dict[str, dict[str, Any]], reasons: dict[str, str]) -> str:
        points = [data for name, data in found.items() if name != "capacity"]
        lines = [f"{self.label}, steps {MIXED_STEPS[0]}-{MIXED_STEPS[-1]} mixed, {self.window_s:.0f} s per point"]
        if "capacity" in found:
            lines.append(f"capacity of step batching: {found['capacity']['images_per_s']:.2f} images/s")
        if not points:
            return "\n".join(lines)
        lines.append(tick_line(points))
        rows: list[tuple[str, ...]] = [
            ("policy", "load", "images/s", "p50 s", "p95 s", "p99 s", "rows per tick", "overloaded: unfinished")
        ]
        for data in sorted(points, key=lambda data: (data["load"], tuple(POLICIES).index(data["policy"]))):
            bound = "≥" if data["num_unfinished"] else ""
            quantiles = [f"{bound}{percentile(data['latencies_s'], share):.2f}" for share in PERCENTILES]
            rows.append(
                (
                    data["policy"],
                    f"{data['load']:.2f}",
                    f"{data['images_per_s']:.2f}",
                    *quantiles,
                    f"{data['rows_per_tick']:.2f}",
                    f"{data['num_unfinished']} of {len(data['latencies_s'])}" if bound else "-",
                )
            )
        lines.append(table(rows))
        if self.plots is not None:
            try:
                lines.append(f"plot: {draw_plots(points, self.plots, f'{self.label}. {tick_line(points)}')}")
            except ImportError as error:
                lines.append(f"no plot: {error}")
        return "\n".join(lines)


def tick_times_ms(ticks: list[TickReport]) -> dict[str, tuple[float, int]]:
    """Median milliseconds and number of ticks, by model rows."""
    by_rows: dict[int, list[float]] = {}
    for report in ticks:
        by_rows.setdefault(report.choice.model_rows, []).append(report.seconds * 1e3)
    return {str(rows): (statistics.median(times), len(times)) for rows, times in sorted(by_rows.items())}


def tick_line(points: list[dict[str, Any]]) -> str:
    """The step policy's median tick times by model rows, the commonest counts only."""
    ticks = next((data["tick_ms"] for data in points if data["policy"] == "step"), points[0]["tick_ms"])
    common = sorted(sorted(ticks, key=lambda rows: -ticks[rows][1])[:4], key=int)
    return "tick: " + ", ".join(f"{ticks[rows][0]:.1f} ms at {rows} model rows" for rows in common)


def draw_plots(points: list[dict[str, Any]], path: Path, title: str) -> Path:
    """Latency by load, and the distribution at each policy's middle load, as PNG. Raises `ImportError`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_load, spread) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    middle = sorted({data["load"] for data in points})[len({data["load"] for data in points}) // 2]
    for colour, policy in zip(("tab:blue", "tab:orange", "tab:gray"), POLICIES, strict=True):
        own = sorted((data for data in points if data["policy"] == policy), key=lambda data: data["load"])
        if not own:
            continue
        loads = [data["load"] for data in own]
        for share, style in ((0.5, ":"), (0.95, "-")):
            values = [percentile(data["latencies_s"], share) for data in own]
            by_load.plot(loads, values, style, marker="o", color=colour, label=f"{policy}, p{round(100 * share)}")
        for data in own:
            if data["load"] == middle:
                ordered = sorted(data["latencies_s"])
                shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
                spread.step(ordered, shares, where="post", color=colour, label=policy)
    by_load.set(xlabel="load, share of the capacity of step batching", ylabel="latency, s", yscale="log")
    spread.set(xlabel=f"latency at load {middle}, s", ylabel="share of requests", xscale="log")
    for axes in (by_load, spread):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
