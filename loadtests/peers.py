"""Darkroom beside what people use instead: `python -m loadtests.peers [--seconds 20] [--record]`.

The same closed loop of clients (steps 8 to 30, guidance on and off), the same built-in weights, dtype and memory
format, one server after the other: Darkroom; FastAPI around a diffusers pipeline with a lock; LitServe with request
batching.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.record import Figure, record
from loadtests.report import HEADINGS, Report, print_table, row_of
from loadtests.servers import SERVERS, stop_on_sigterm
from loadtests.stages import Stage, run_stage

CLIENTS = (8, 32)


def measure(
    report: Report,
    *,
    clients: Sequence[int] = CLIENTS,
    seconds: float = 20.0,
    warm_up_s: float = 3.0,
    servers: Sequence[str] = tuple(SERVERS),
    seed: int = 0,
) -> None:
    """Load each server with each number of clients and add the stages to `report`."""
    for name in servers:
        with SERVERS[name]() as target:
            for count in clients:
                report.add(
                    run_stage(
                        target,
                        {"Mixed": count},
                        part="peers",
                        label=f"{count} clients",
                        seconds=seconds,
                        warm_up_s=warm_up_s,
                        warm_up_images=count,
                        seed=seed,
                    )
                )


def advantages(stages: Sequence[Stage]) -> list[Figure]:
    """For each load and peer, Darkroom's images/s and p95 over the peer's; a peer without pictures is left out."""
    figures = []
    ours = {stage.label: stage for stage in stages if stage.server == "darkroom"}
    for stage in stages:
        own = ours.get(stage.label)
        if own is None or stage is own or not stage.images_s or not stage.p95_s or own.p95_s is None:
            continue
        name = f"peers, {stage.label}, darkroom over {stage.server}"
        figures += [
            Figure(f"{name}, images/s", own.images_s / stage.images_s, "x"),
            Figure(f"{name}, p95", own.p95_s / stage.p95_s, "x"),
        ]
    return figures


def figures_of(stages: Sequence[Stage]) -> list[Figure]:
    """The rows for results.csv."""
    figures = []
    for stage in stages:
        name = f"peers, {stage.label}, {stage.server}"
        detail = f"generator {stage.cpu_share:.0%} of a core, {sum(stage.errors.values())} errors"
        figures.append(Figure(f"{name}, images/s", stage.images_s, "images/s", detail=detail))
        for share, value in (("p50", stage.p50_s), ("p95", stage.p95_s), ("p99", stage.p99_s)):
            if value is not None:
                figures.append(Figure(f"{name}, {share}", value, "s", detail=detail))
    return figures + advantages(stages)


def record_figures(stages: Sequence[Stage]) -> None:
    record(figures_of(stages), "diffusers", "fastapi", "litserve", "locust")


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line, `words` in place of the process's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--seconds", type=float, default=20.0, help="measured at each load")
    parser.add_argument("--warm-up-s", type=float, default=3.0, help="before each load, at least")
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results.csv")
    arguments = parser.parse_args(words)
    report = Report({})
    measure(
        report,
        clients=arguments.clients,
        seconds=arguments.seconds,
        warm_up_s=arguments.warm_up_s,
        servers=arguments.servers,
        seed=arguments.seed,
    )
    stages = sorted(report.stages, key=lambda stage: stage.num_users)
    print_table("Beside other servers", HEADINGS, [row_of(stage) for stage in stages], report.console)
    for figure in advantages(stages):
        report.console.print(f"{figure.name}: {figure.value:.2f}", highlight=False)
    for note in report.notes():
        report.console.print(note, highlight=False)
    if arguments.record:
        record_figures(report.stages)


if __name__ == "__main__":
    stop_on_sigterm()
    main()
