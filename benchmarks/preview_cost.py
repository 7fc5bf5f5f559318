"""What previews cost: `python -m benchmarks.preview_cost [--rounds 8] [--jobs 64] [--steps 50] [--record]`.

One worker with the built-in model makes the same pictures through a private redis-server, with nobody watching and with
the previews of every job being followed, in turn. Those who follow are in the worker's own process, so what it costs to
read the previews is in the figure as well.
"""

from __future__ import annotations

import argparse
import statistics

from darkroom import logs
from darkroom.jobs import Job
from darkroom.queue import JobQueue

from benchmarks.record import Figure, record
from benchmarks.served import Beside, costs, in_turn


class Watching:
    """Follows the previews of each job, and counts them."""

    def __init__(self) -> None:
        self.num_previews = 0

    async def __call__(self, queue: JobQueue, job: Job) -> None:
        async for event in queue.events(job.id, previews="linear"):
            self.num_previews += event.kind == "preview"


async def following(queue: JobQueue, job: Job) -> None:
    """Follow a job without its previews, as callers do anyway."""
    async for _ in queue.events(job.id):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    logs.configure("error", process="benchmark")
    watching = Watching()
    sides: dict[str, tuple[dict[str, object], Beside]] = {"off": ({}, following), "on": ({}, watching)}
    rates = in_turn(sides, rounds=arguments.rounds, jobs=arguments.jobs, steps=arguments.steps)
    low, middle, high = costs(rates["off"], rates["on"])
    per_job = watching.num_previews / (arguments.jobs * (arguments.rounds + 1))
    for name, values in rates.items():
        print(f"previews {name:4} {statistics.median(values):7.3f} images/s")
    print(f"{per_job:.1f} previews of each picture")
    print(f"cost {middle:.2f} % of throughput (quartiles {low:.2f} to {high:.2f}, {arguments.rounds} rounds)")
    if arguments.record:
        record(
            [
                *(Figure(f"previews {name}", statistics.median(rates[name]), "images/s") for name in rates),
                Figure("previews, for each picture", per_job, "previews"),
                Figure("previews, cost", middle, "%", detail=f"quartiles {low:.2f} to {high:.2f}"),
            ],
            "redis",
        )


if __name__ == "__main__":
    main()
