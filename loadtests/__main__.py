"""`python -m loadtests`: load Darkroom in every way and write a report. See loadtests/README.md.

Without `--url` it starts `darkroom up` with the built-in model on a free port, and for the overload another one with a
small queue.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.record import command_line, commit, device_name, versions
from loadtests import overload, peers
from loadtests.report import Report
from loadtests.servers import darkroom, stop_on_sigterm
from loadtests.stages import Target, run_stage

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
PARTS = ("ladder", "users", "overload", "peers")
REPORTS = Path(__file__).parent / "reports"
# Each kind of client alone, and well-behaved ones beside abusive ones.
CROWDS: tuple[tuple[str, dict[str, int]], ...] = (
    ("8 steady", {"Steady": 8}),
    ("8 in bursts", {"Burst": 8}),
    ("8 mixed steps", {"Mixed": 8}),
    ("8 mixed steps, samplers and sizes", {"Varied": 8}),
    ("8 with a long tail", {"LongTail": 8}),
    ("8 async pollers", {"AsyncPoller": 8}),
    ("8 SSE watchers", {"SseWatcher": 8}),
    ("8 steady beside 2 abusive", {"Steady": 8, "Abusive": 2}),
)


def about() -> dict[str, str]:
    """What a run was made of."""
    return {
        "made": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command_line(),
        "device": device_name(),
        "versions": versions("locust", "diffusers", "fastapi"),
    }


def run_ladder(target: Target, report: Report, arguments: argparse.Namespace) -> None:
    """One stage for each number of clients, closed loop."""
    for clients in arguments.concurrency:
        report.add(
            run_stage(
                target,
                {arguments.mix: clients},
                part="ladder",
                label=f"{clients} client" + "s" * (clients > 1),
                seconds=arguments.seconds,
                warm_up_s=arguments.warm_up_s,
                warm_up_images=clients,
                seed=arguments.seed,
            )
        )


def run_crowds(target: Target, report: Report, arguments: argparse.Namespace) -> None:
    """One stage for each kind of client."""
    for label, crowd in CROWDS:
        report.add(
            run_stage(
                target,
                crowd,
                part="users",
                label=label,
                seconds=arguments.seconds,
                warm_up_s=arguments.warm_up_s,
                warm_up_images=crowd.get("Steady", 1),
                seed=arguments.seed,
            )
        )


@contextlib.contextmanager
def target_of(arguments: argparse.Namespace) -> Iterator[Target]:
    """The server named by `--url`, else one of our own."""
    if arguments.url:
        yield Target("darkroom", arguments.url.rstrip("/"), arguments.metrics)
    else:
        with darkroom() as target:
            yield target


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line, `words` in place of the process's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=os.environ.get("LOADTEST_URL"), help="(default: LOADTEST_URL, else our own)")
    parser.add_argument(
        "--metrics",
        nargs="*",
        default=os.environ.get("LOADTEST_METRICS", "").split(),
        help="metrics URLs of its workers (default: LOADTEST_METRICS)",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mix", default="Mixed", help="the users of the ladder")
    parser.add_argument("--concurrency", nargs="+", type=int, default=list(CONCURRENCY))
    parser.add_argument("--seconds", type=float, default=10.0, help="measured in each stage")
    parser.add_argument("--warm-up-s", type=float, default=2.0, help="before each stage, at least")
    parser.add_argument("--overload-factor", type=float, default=overload.OVERLOAD, help="arrivals over capacity")
    parser.add_argument("--peer-clients", nargs="+", type=int, default=list(peers.CLIENTS))
    parser.add_argument("--peer-seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="report directory (default: a new one in loadtests/reports)")
    parser.add_argument("--record", action="store_true", help="append the peers' figures to benchmarks/results.csv")
    arguments = parser.parse_args(words)
    # These parts start servers of their own.
    parts = [part for part in arguments.parts if not arguments.url or part in ("ladder", "users")]

    report = Report(about())
    if {"ladder", "users"} & set(parts):
        with target_of(arguments) as target:
            if "ladder" in parts:
                run_ladder(target, report, arguments)
            if "users" in parts:
                run_crowds(target, report, arguments)
    if "overload" in parts:
        stages, report.overload, report.visits = overload.measure(
            seconds=arguments.seconds,
            warm_up_s=arguments.warm_up_s,
            factor=arguments.overload_factor,
            seed=arguments.seed,
        )
        for stage in stages:
            report.add(stage)
    if "peers" in parts:
        peers.measure(report, clients=arguments.peer_clients, seconds=arguments.peer_seconds, seed=arguments.seed)
    report.print()
    directory = arguments.out or REPORTS / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    report.write(directory)
    report.console.print(f"report: {directory}/report.md", highlight=False)
    if arguments.record:
        peers.record_figures(report.of("peers"))


if __name__ == "__main__":
    stop_on_sigterm()
    main()
