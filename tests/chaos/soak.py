"""Minutes of steady load: does memory stay where it is, and does Redis get empty again?"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from benchmarks.record import Figure
from tests.chaos.load import Book, Client, make_bodies
from tests.chaos.stack import Stack
from tests.chaos.verdict import GONE_AT_REST, NEVER_EXPIRES, TERMINAL, come_to_rest, read_keys, wait_until

# So that what has ended is gone within a run.
SETTINGS: dict[str, Any] = {"result_ttl_s": 30, "job_ttl_s": 60}
SAMPLE_S = 2.0
# Memory is counted once allocators and caches have seen what they will see: after so many short requests, and then as
# many minutes of the load itself as are counted. An API's blocks in use are as many after 1,000 calls as after 10,000,
# but its malloc goes on spreading them, some 25 bytes a call, over pages of the heap that start-up left untouched.
WARM_UP_REQUESTS, WARM_UP_S = 10_000, 1800.0
NUM_CLIENTS, NUM_WARM_UP_CLIENTS = 3, 16
# Keys that say which models there are and who serves them; a worker alone has them too.
_STANDING = NEVER_EXPIRES - GONE_AT_REST | {"workers", "worker", "serving", "pace", "debts"}


def slope_with_interval(seconds: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The least-squares slope of `values` and half its 95 % interval, both per second.

    Samples of a process's memory depend on those before them, so the residuals' correlation at lag one widens the
    interval: n(1 - r) / (1 + r) of n samples count. Memory goes in steps, and of few steps few samples count, for which
    Student's t is much wider than the normal distribution.
    """
    x, y = np.asarray(seconds, float), np.asarray(values, float)
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    rest = y - y.mean() - slope * x
    spread = float((rest * rest).sum())
    r = float((rest[1:] * rest[:-1]).sum() / spread) if spread else 0.0
    counted = max(3.0, len(x) * (1 - max(0.0, r)) / (1 + max(0.0, r)))
    error = (spread / (counted - 2) / float((x * x).sum())) ** 0.5
    return slope, float(student_t.ppf(0.975, counted - 2)) * error


def rss_bytes(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


async def soak(stack: Stack, minutes: float, seed: int, say: Callable[[str], None]) -> tuple[bool, str, list[Figure]]:
    """Load one API and one worker, started as users start them, and watch their memory and Redis' keys.

    The load lasts twice the `minutes`, of which the later half counts.
    """
    figures: list[Figure] = []
    members = [await stack.start(name, is_fresh=True) for name in ("api-0", "worker-0")]
    book, stop = Book(), asyncio.Event()
    urls = [members[0].url]
    bodies = make_bodies(random.Random(seed))

    def start_clients(
        name: str, number: int, bodies: Sequence[dict[str, Any]], stop: asyncio.Event
    ) -> list[asyncio.Task[None]]:
        # With names each guided request would have a text of its own, and memory would grow until the worker's cache of
        # texts is full.
        clients = [
            Client(f"{name}-{n}", random.Random(f"{seed}-{n}"), lambda: urls, bodies, book, is_naming=False)
            for n in range(number)
        ]
        return [asyncio.create_task(client.run(stop, 0.1)) for client in clients]

    is_warm = asyncio.Event()
    short = [{**body, "num_inference_steps": 2} for body in bodies]
    load = start_clients("warm-up", NUM_WARM_UP_CLIENTS, short, is_warm)
    await wait_until(lambda: book.num_requests >= WARM_UP_REQUESTS, WARM_UP_S, "the warm-up")
    is_warm.set()
    await asyncio.gather(*load)
    say(f"warm after {book.num_requests} short requests")

    load = start_clients("client", NUM_CLIENTS, bodies, stop)
    began, told_at = time.monotonic(), time.monotonic()
    samples: list[tuple[float, list[int]]] = []
    while (now := time.monotonic() - began) < 2 * 60 * minutes:
        samples.append((now, [rss_bytes(member.child.pid) for member in members]))
        if time.monotonic() - told_at > 30:
            told_at = time.monotonic()
            sizes = ", ".join(
                f"{member.kind} {size / 2**20:.2f} MiB" for member, size in zip(members, samples[-1][1], strict=True)
            )
            num_keys = len(await read_keys(stack.queue, stack.settings))
            say(f"{now:6.0f} s  {book.num_requests} requests, {len(book.failed)} failed; {sizes}; {num_keys} keys")
        await asyncio.sleep(SAMPLE_S)
    stop.set()
    await asyncio.gather(*load)
    await come_to_rest(stack.queue)

    steady = [sample for sample in samples if sample[0] >= 60 * minutes]
    is_well = not book.failed
    for failure in book.failed[:10]:
        say(f"  {failure}")
    for index, member in enumerate(members):
        slope, half = slope_with_interval([at for at, _ in steady], [sizes[index] for _, sizes in steady])
        is_flat = slope - half <= 0
        is_well &= is_flat
        per_hour, half_per_hour = slope * 3600 / 2**20, half * 3600 / 2**20
        detail = f"{minutes:g} minutes, ± {half_per_hour:.3g} (95 %), {book.num_requests} requests"
        figures.append(Figure(f"soak, RSS slope of the {member.kind}", per_hour, "MiB/h", detail=detail))
        say(
            f"{member.kind}: RSS {steady[0][1][index] / 2**20:.1f} to {steady[-1][1][index] / 2**20:.1f} MiB, "
            f"{per_hour:+.2f} ± {half_per_hour:.2f} MiB an hour (95 %), which "
            f"{'includes zero or falls' if is_flat else 'DOES NOT include zero'}"
        )
    left: list[str] = []

    async def is_empty() -> bool:
        nonlocal left
        keys = await read_keys(stack.queue, stack.settings)
        left = [name for name in keys if name.partition(":")[0] not in _STANDING]
        return not left

    try:
        await wait_until(is_empty, SETTINGS["job_ttl_s"] + 30.0, "an empty Redis")
    except AssertionError:
        is_well = False
        say(f"keys left behind: {left[:20]}")
    counters = (await stack.queue.stats()).counters
    if counters["accepted"] != sum(counters[state] for state in TERMINAL):
        is_well = False
        say(f"WRONG the counters do not add up: {counters}")
    figures.append(Figure("soak, keys left in Redis after their time", len(left), "keys"))
    line = (
        f"{minutes:g} minutes, {book.num_requests} requests, {len(book.failed)} failed, {len(left)} keys left, "
        f"{'memory flat' if is_well else 'NOT all as it should be'}"
    )
    return is_well, line, figures
