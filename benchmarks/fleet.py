"""How far one Redis goes: `python -m benchmarks.fleet [--workers 8,32,128,256,512] [--record]`.

Starts one real redis-server and a fleet of simulated workers (`benchmarks.simulated_fleet`) beside it, lets clients
arrive at a rate, and prints what the queue did: jobs/s, the server's CPU, latency of claims, and the largest terms.

Every tick time is assumed, none is measured: see `LOADS`. The figures are about Redis and the queue's scripts alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import redis
from darkroom.config import Settings
from darkroom.queue import watcher
from darkroom.queue.connection import RedisConnection
from darkroom.queue.embedded import find_redis_server

from benchmarks.arrivals import percentile
from benchmarks.gpu.sections import table
from benchmarks.record import Figure, device_name, record
from benchmarks.service import free_port
from benchmarks.simulated_fleet import Load, Samples, run_clients, run_workers

# Assumed, not measured. FLOPs of one model row's UNet call and of one VAE decode are counted from the architectures, an
# H200 reaches 790 TFLOP/s in large bf16 products, and `EFFICIENCY` of that is what a strong bf16 server makes of full
# batches (1.7 to 2.0 SDXL images/s under a limit of 2.8). A small tick is bound by latency: the shortest one taken is
# the best published step of a single picture on an H100 (104.6 and 21.6 steps/s, chengzeyi/stable-fast).
PEAK_FLOPS = 790e12
EFFICIENCY = 0.65


def _load(model: str, side_px: int, row_flops: float, decode_flops: float, steps_per_s: float, size: int) -> Load:
    speed = PEAK_FLOPS * EFFICIENCY
    return Load(model, side_px, 20, row_flops / speed, 1 / steps_per_s, decode_flops / speed, size)


# The last number is a photograph (scikit-image's astronaut) as Darkroom writes it, PNG at level 1, in bytes.
LOADS = {
    "sd15": _load("sd15", 512, 803.3e9, 2514e9, 104.6, 466_000),
    "sdxl": _load("sdxl", 1024, 6761e9, 10470e9, 21.6, 1_424_000),
}

# Redis runs scripts on one thread. Beyond this share of it, or with claims slower than this, one Redis has ended.
REDIS_END_SHARE = 0.9
CLAIM_END_S = 0.1
# Where a process of the generator or the whole machine is this busy, a latency says nothing of Redis any more, and a
# rate neither; CPU per job still does.
GENERATOR_END_SHARE = 0.85
KEPT_UP_SHARE = 0.9
MACHINE_END_SHARE = 0.95
SLOWLOG_S = 2.0
# The log also holds what scripts call, and those commands are shorter than this; no script is.
SLOWLOG_LEAST_US = 10
CLIENT_COMMANDS = ("evalsha", "eval", "blpop", "get", "mget", "multi", "exec", "ping", "subscribe")


class Term(NamedTuple):
    """A script's or command's calls per second, their mean and p99 in µs, and its part of one core."""

    name: str
    calls: float
    mean_us: float
    p99_us: float
    share: float


@dataclass(frozen=True)
class Point:
    """One fleet under one load. Rates per second; `*_share` are parts of one core, `machine_share` of all of them."""

    load: Load
    workers: int
    idle_share: float
    idle_commands: float
    offered: float
    achieved: float
    refused: float
    failed: float
    commands: float
    inner_commands: float
    main_share: float
    redis_share: float
    used_bytes: int
    generator_share: float
    machine_share: float
    claim_s: tuple[float, float]
    enqueue_p99_s: float
    lag_p99_s: float
    terms: list[Term]

    @property
    def redis_s_per_job(self) -> float:
        """The main thread's CPU per job, beyond what the idle fleet takes."""
        return (self.main_share - self.idle_share) / self.achieved if self.achieved else math.nan

    @property
    def computed_end(self) -> float:
        """Jobs/s at which the main thread would be `REDIS_END_SHARE` busy with this many workers, from its CPU here."""
        return (REDIS_END_SHARE - self.idle_share) / self.redis_s_per_job

    @property
    def limit(self) -> str:
        """What held this point back."""
        if self.main_share >= REDIS_END_SHARE:
            return "redis"
        if self.generator_share >= GENERATOR_END_SHARE:
            return "generator"
        if self.machine_share >= MACHINE_END_SHARE:
            return "machine"
        if self.claim_s[1] > CLAIM_END_S:
            return "claims"
        return "none"


class Server:
    """A redis-server of its own on a free TCP port, set as a fleet's is: append-only file, nothing evicted."""

    def __init__(self, directory: Path, appendfsync: str) -> None:
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}"
        options = {
            "port": port,
            "bind": "127.0.0.1",
            "dir": directory,
            "appendonly": "yes",
            "appendfsync": appendfsync,
            "save": "",
            "maxmemory": psutil.virtual_memory().available // 2,
            "maxmemory-policy": "noeviction",
            "slowlog-max-len": 100_000,
            "slowlog-log-slower-than": -1,
        }
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        # The watcher ends the server when this process ends, however that happens.
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", watcher.__file__, find_redis_server(), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        self.client = redis.Redis(port=port, protocol=2)
        ends_at = time.monotonic() + 10
        while True:
            try:
                self.client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < ends_at, "redis-server did not start"
                time.sleep(0.02)
        server: Any = self.client.info("server")
        self.process = psutil.Process(server["process_id"])

    def main_thread_s(self) -> float:
        info: Any = self.client.info("cpu")
        return float(info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"])

    def calls(self) -> tuple[int, int]:
        """Commands so far: those that clients sent, and all, with those that scripts call."""
        stats: Any = self.client.info("commandstats")
        sent = sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in CLIENT_COMMANDS)
        return sent, sum(entry["calls"] for entry in stats.values())

    def slow_log(self, names: dict[str, str]) -> list[Term]:
        """What the main thread does for `SLOWLOG_S`, by script or command, largest first, and the rest."""
        self.client.slowlog_reset()
        self.client.config_set("slowlog-log-slower-than", SLOWLOG_LEAST_US)
        started, spent_before_s = time.monotonic(), self.main_thread_s()
        time.sleep(SLOWLOG_S)
        seconds, spent_s = time.monotonic() - started, self.main_thread_s() - spent_before_s
        self.client.config_set("slowlog-log-slower-than", -1)
        spent: dict[str, list[float]] = defaultdict(list)
        for entry in self.client.slowlog_get(100_000):
            words = entry["command"].split(b" ", 2)
            name = words[0].decode().lower()
            if name in CLIENT_COMMANDS:
                spent[names.get(words[1].decode(), name) if name == "evalsha" else name].append(entry["duration"])
        terms = [
            Term(name, len(us) / seconds, sum(us) / len(us), percentile(us, 0.99), sum(us) / 1e6 / seconds)
            for name, us in spent.items()
        ]
        rest = Term("sockets, append-only file", 0, 0, 0, spent_s / seconds - sum(term.share for term in terms))
        return [*sorted(terms, key=lambda term: -term.share), rest]

    def stop(self) -> None:
        self.client.close()
        self.process.kill()
        self._watcher.communicate()


@dataclass(frozen=True)
class Child:
    """A process of simulated workers or clients."""

    process: Any
    pipe: Connection

    @classmethod
    def start(cls, target: Callable[..., None], *arguments: object) -> Child:
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.simulated_fleet"])
        process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit("a process of the load generator ended by itself; its error is above") from None

    def collect(self) -> Samples:
        self.pipe.send("samples")
        samples: Samples = self.receive()
        return samples

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def running_fleet(
    server: Server, settings: Settings, load: Load, workers: int, processes: int
) -> Iterator[list[Child]]:
    """`workers` registered workers in `processes` processes; whatever is added to the list is ended with them."""
    counts = [len(range(first, workers, processes)) for first in range(min(processes, workers))]
    children = [Child.start(run_workers, settings, server.url, load, count, seed) for seed, count in enumerate(counts)]
    try:
        for child in children:
            child.receive()
        yield children
    finally:
        for child in children:
            child.process.kill()
        for child in children:
            child.process.join()


@dataclass
class Meter:
    """CPU and commands from here to `read`."""

    server: Server
    children: Sequence[Child]

    def __post_init__(self) -> None:
        psutil.cpu_percent()
        self.started, self._before = time.monotonic(), self._now()

    def _now(self) -> list[float]:
        times = self.server.process.cpu_times()
        sent, inner = self.server.calls()
        counts = (sent, inner, self.server.main_thread_s(), times.user + times.system)
        return [*counts, *(child.cpu_s() for child in self.children)]

    def read(self) -> tuple[list[float], float]:
        """(client commands, all commands, CPU of Redis's main thread, of its process, of each child), all per second;
        and the machine's share."""
        now, seconds = self._now(), time.monotonic() - self.started
        return [(after - before) / seconds for before, after in zip(self._before, now, strict=True)], (
            psutil.cpu_percent() / 100
        )


def measure(
    load: Load, workers: int, rate: float, arguments: argparse.Namespace, script_names: dict[str, str]
) -> Point:
    """Start a fleet, watch it idle, then under `rate` jobs/s."""
    with tempfile.TemporaryDirectory(prefix="darkroom-fleet-") as directory:
        server = Server(Path(directory), arguments.appendfsync)
        try:
            settings = fleet_settings(arguments, server.url)
            with running_fleet(server, settings, load, workers, arguments.worker_processes) as children:
                time.sleep(arguments.warm_up_s / 4)
                idle = Meter(server, children)
                time.sleep(arguments.window_s / 2)
                (idle_commands, _, idle_share, *_), _ = idle.read()

                share = rate / arguments.client_processes
                for seed in range(arguments.client_processes):
                    options = (share, arguments.cancelled_share, seed)
                    children.append(Child.start(run_clients, settings, server.url, load, *options))
                time.sleep(arguments.warm_up_s)
                meter = Meter(server, children)
                time.sleep(arguments.window_s)
                (commands, inner, main_share, redis_share, *generators), machine_share = meter.read()
                window = (meter.started, time.monotonic())
                memory: Any = server.client.info("memory")
                terms = server.slow_log(script_names)
                for child in children[len(children) - arguments.client_processes :]:
                    child.receive()
                samples = [child.collect() for child in children]
        finally:
            server.stop()

    def within(timed: Iterable[tuple[float, Any]]) -> list[Any]:
        return [value for at, value in timed if window[0] <= at < window[1]]

    seconds = window[1] - window[0]
    claims = within(itertools.chain.from_iterable(sample.claims for sample in samples))
    enqueues = within(itertools.chain.from_iterable(sample.enqueues for sample in samples))
    lags = within(itertools.chain.from_iterable(sample.lags for sample in samples))
    ends = within(itertools.chain.from_iterable(sample.ends for sample in samples))
    sent = [at for sample in samples for at in sample.sent if window[0] <= at < window[1]]
    return Point(
        load=load,
        workers=workers,
        idle_share=idle_share,
        idle_commands=idle_commands,
        offered=len(sent) / seconds,
        achieved=ends.count("succeeded") / seconds,
        refused=ends.count("refused") / seconds,
        failed=ends.count("failed") / seconds,
        commands=commands,
        inner_commands=inner,
        main_share=main_share,
        redis_share=redis_share,
        used_bytes=memory["used_memory"],
        generator_share=max(generators),
        machine_share=machine_share,
        claim_s=(percentile(claims or [0.0], 0.5), percentile(claims or [0.0], 0.99)),
        enqueue_p99_s=percentile(enqueues or [0.0], 0.99),
        lag_p99_s=percentile(lags or [0.0], 0.99),
        terms=terms,
    )


def fleet_settings(arguments: argparse.Namespace, url: str) -> Settings:
    # Results and records leave as early as the settings allow: what they take up is arithmetic, and printed as such.
    return Settings(redis_url=url, result_ttl_s=10, job_ttl_s=60, data_dir=Path(tempfile.gettempdir()))


def run(arguments: argparse.Namespace) -> list[Point]:
    """Every fleet size of every model. Past the first point that did not keep up, larger fleets are offered a little
    less than that one achieved: what they show then is the price of more workers at the same jobs/s."""
    connection = RedisConnection(Settings(result_ttl_s=10, job_ttl_s=60), "redis://127.0.0.1")
    script_names = {sha: name for name, sha in connection._shas.items()}
    points: list[Point] = []
    for model in arguments.models.split(","):
        load = LOADS[model]
        if arguments.picture_bytes is not None:
            load = dataclasses.replace(load, picture_bytes=arguments.picture_bytes)
        most = arguments.most_rate
        for workers in map(int, arguments.workers.split(",")):
            point = measure(load, workers, min(most, arguments.load * workers * load.capacity), arguments, script_names)
            if point.achieved < KEPT_UP_SHARE * point.offered:
                most = min(most, 0.8 * point.achieved)
            points.append(point)
            print(f"{model}, {workers} workers: {point.achieved:.0f} of {point.offered:.0f} jobs/s", file=sys.stderr)
    return points


def shown(points: Sequence[Point]) -> str:
    head = (
        "model", "workers", "idle Redis %", "idle cmd/s", "offered/s", "done/s", "refused/s", "failed/s", "cmd/s",
        "with inner/s", "Redis %", "Redis proc %", "generator %", "machine %", "claim p50 ms", "claim p99 ms",
        "enqueue p99 ms", "lag p99 ms", "Redis ms/job", "MiB", "limit", "computed end/s",
    )  # fmt: skip
    rows = [
        (
            point.load.model,
            f"{point.workers}",
            f"{point.idle_share * 100:.1f}",
            f"{point.idle_commands:.0f}",
            f"{point.offered:.1f}",
            f"{point.achieved:.1f}",
            f"{point.refused:.1f}",
            f"{point.failed:.1f}",
            f"{point.commands:.0f}",
            f"{point.inner_commands:.0f}",
            f"{point.main_share * 100:.1f}",
            f"{point.redis_share * 100:.1f}",
            f"{point.generator_share * 100:.0f}",
            f"{point.machine_share * 100:.0f}",
            f"{point.claim_s[0] * 1e3:.2f}",
            f"{point.claim_s[1] * 1e3:.2f}",
            f"{point.enqueue_p99_s * 1e3:.2f}",
            f"{point.lag_p99_s * 1e3:.2f}",
            f"{point.redis_s_per_job * 1e3:.2f}",
            f"{point.used_bytes / 2**20:.0f}",
            point.limit,
            f"{point.computed_end:.0f}",
        )
        for point in points
    ]
    return table([head, *rows])


def shown_terms(point: Point) -> str:
    """Where the server's main thread was, largest term first."""
    rows = [
        (
            term.name,
            f"{term.calls:.0f}" if term.calls else "",
            f"{term.mean_us:.0f}" if term.calls else "",
            f"{term.p99_us:.0f}" if term.calls else "",
            f"{term.share * 100:.1f}",
        )
        for term in point.terms
        if abs(term.share) > 0.001
    ]
    return table([("script or command", "calls/s", "mean µs", "p99 µs", "% of a core"), *rows])


def figures(points: Iterable[Point]) -> Iterator[Figure]:
    for point in points:
        name = f"fleet, {point.load.model}, {point.workers} simulated workers"
        name += f", {point.load.picture_bytes / 1000:g} kB pictures"
        detail = (
            f"offered {point.offered:.1f}/s; Redis {point.main_share:.0%} of a core; "
            f"generator {point.generator_share:.0%}; machine {point.machine_share:.0%}; limit: {point.limit}"
        )
        yield Figure(f"{name}, jobs", point.achieved, "jobs/s", detail=detail)
        yield Figure(
            f"{name}, Redis CPU per job",
            point.redis_s_per_job * 1e3,
            "ms",
            detail=f"computed end {point.computed_end:.0f} jobs/s at {REDIS_END_SHARE:.0%} of a core",
        )
        yield Figure(
            f"{name}, claim p99",
            point.claim_s[1] * 1e3,
            "ms",
            detail=f"p50 {point.claim_s[0] * 1e3:.2f} ms; enqueue p99 {point.enqueue_p99_s * 1e3:.2f} ms; "
            f"generator's loop late by {point.lag_p99_s * 1e3:.2f} ms at p99",
        )
        yield Figure(
            f"{name}, Redis while idle", point.idle_share * 100, "%", detail=f"{point.idle_commands:.0f} commands/s"
        )


def main(words: Sequence[str] | None = None) -> list[Point]:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="sd15,sdxl", help=f"of {', '.join(LOADS)}")
    parser.add_argument("--workers", default="8,32,128,256,512")
    parser.add_argument("--load", type=float, default=0.8, help="part of the fleet's capacity that clients ask for")
    parser.add_argument("--most-rate", type=float, default=float("inf"), help="most jobs/s that clients ask for")
    parser.add_argument("--picture-bytes", type=int, help="size of every picture, instead of the model's")
    parser.add_argument("--cancelled-share", type=float, default=0.02, help="part of the clients that cancel")
    parser.add_argument("--appendfsync", choices=("everysec", "always", "no"), default="everysec")
    parser.add_argument("--worker-processes", type=int, default=max(2, min(8, cores - 4)))
    parser.add_argument("--client-processes", type=int, default=max(2, min(4, cores // 4)))
    parser.add_argument("--warm-up-s", type=float, default=8.0)
    parser.add_argument("--window-s", type=float, default=10.0)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args(words)
    points = run(arguments)
    print(shown(points))
    for point in points:
        print(f"\n{point.load.model}, {point.workers} workers, {point.achieved:.0f} jobs/s: Redis's main thread")
        print(shown_terms(point))
    if arguments.record:
        record(figures(points), "redis", device=device_name("cpu"))
    return points


if __name__ == "__main__":
    main()
