"""What checkpoints cost: `python -m benchmarks.checkpoint_cost [--rounds 8] [--jobs 64] [--steps 50] [--record]`.

One worker with the built-in model makes the same pictures through a private redis-server, with checkpoints at their
default interval and without, in turn.
"""

from __future__ import annotations

import argparse
import statistics

from darkroom import logs

from benchmarks.record import Figure, record
from benchmarks.served import costs, in_turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    logs.configure("error", process="benchmark")
    off: dict[str, float] = {"checkpoint_interval_s": 0.0}
    rates = in_turn(
        {"off": (off, None), "on": ({}, None)}, rounds=arguments.rounds, jobs=arguments.jobs, steps=arguments.steps
    )
    low, middle, high = costs(rates["off"], rates["on"])
    for name, values in rates.items():
        print(f"checkpoints {name:4} {statistics.median(values):7.3f} images/s")
    print(f"cost {middle:.2f} % of throughput (quartiles {low:.2f} to {high:.2f}, {arguments.rounds} rounds)")
    if arguments.record:
        record(
            [
                *(Figure(f"checkpoints {name}", statistics.median(rates[name]), "images/s") for name in rates),
                Figure("checkpoints, cost", middle, "%", detail=f"quartiles {low:.2f} to {high:.2f}"),
            ],
            "redis",
        )


if __name__ == "__main__":
    main()
