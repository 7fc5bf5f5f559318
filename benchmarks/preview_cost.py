"""What previews cost: `python -m benchmarks.preview_cost [--rounds 8] [--jobs 64] [--steps 50] [--record]`.

One worker with the built-in model makes the same pictures through a private redis-server, in turn with the previews of
every job being followed, and with its other events alone. Those who follow are in a process of their own, as API
processes are, and on the same processor.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from darkroom import logs, metrics
from darkroom.jobs import Job, Previews

from benchmarks.record import Figure, record
from benchmarks.served import Beside, costs, in_turn

FOLLOWER = """
import asyncio, sys
from darkroom import logs
from darkroom.config import load_settings
from darkroom.queue import JobQueue

async def follow(queue, job_id):
    async for _ in queue.events(job_id, previews=sys.argv[2]):
        pass

async def main():
    queue, lines, following = await JobQueue.connect(load_settings(), sys.argv[1]), asyncio.StreamReader(), set()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        task = asyncio.create_task(follow(queue, line.decode().strip()))
        following.add(task)
        task.add_done_callback(following.discard)
    await queue.close()

logs.configure("error", process="benchmark")
asyncio.run(main())
"""


class Followers:
    """Follows each job, from another process."""

    def __init__(self, previews: Previews) -> None:
        self._previews = previews
        self._process: subprocess.Popen[str] | None = None

    async def __call__(self, url: str, job: Job) -> None:
        if self._process is None:
            command = [sys.executable, "-c", FOLLOWER, url, self._previews]
            # Once, before anything is measured.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert self._process.stdin is not None
        self._process.stdin.write(f"{job.id}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    logs.configure("error", process="benchmark")
    watching, following = Followers("linear"), Followers("off")
    sides: dict[str, tuple[dict[str, object], Beside]] = {"off": ({}, following), "on": ({}, watching)}
    try:
        rates = in_turn(sides, rounds=arguments.rounds, jobs=arguments.jobs, steps=arguments.steps)
    finally:
        watching.close()
        following.close()
    low, middle, high = costs(rates["off"], rates["on"])
    made = metrics.REGISTRY.get_sample_value("darkroom_previews_total", {"kind": "linear"}) or 0.0
    per_job = made / (arguments.jobs * (arguments.rounds + 1))
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
