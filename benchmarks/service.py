"""What the service costs on top of the engine: `python -m benchmarks.service [--requests 200] [--record]`.

Starts `darkroom up` with the built-in model in a fresh data directory, then measures start-up, the time that one
request spends outside the engine (HTTP, Redis, hand-overs, image compression), client round trips to Redis per job,
and memory over many requests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import redis

from benchmarks.record import record

# Redis counts the commands that scripts call as well; a client's round trips are what is left without them.
SCRIPT_CALLS = ("evalsha", "eval", "fcall")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_service() -> Iterator[tuple[str, psutil.Process, Path, float]]:
    """`darkroom up` on a free port: yields its URL, process, data directory and seconds to ready."""
    with tempfile.TemporaryDirectory() as data_dir:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("darkroom")), "up", "--port", str(port)],
            env={**os.environ, "DARKROOM_DATA_DIR": data_dir},
            stdout=subprocess.DEVNULL,
        )
        try:
            while time.perf_counter() - started < 60:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health/ready").status_code == 200:
                        break
                time.sleep(0.02)
            yield url, psutil.Process(process.pid), Path(data_dir), time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(10)


def rss_mib(process: psutil.Process) -> dict[str, float]:
    """Resident MiB of each child, by what it runs."""
    sizes = {}
    for child in process.children(recursive=True):
        words = child.cmdline()
        role = next(
            (role for role in ("worker", "api", "redis-server") if any(role in word for word in words)), "other"
        )
        sizes[role] = child.memory_info().rss / 2**20
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--soak", type=int, default=2000)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    figures: list[tuple[str, float, str]] = []

    with running_service() as (url, process, data_dir, ready_s), httpx.Client(base_url=url, timeout=60) as client:
        figures.append(("service, seconds to ready", ready_s, "s"))
        body = {"prompt": "a duck in a forest", "num_inference_steps": 20, "seed": 1}
        for _ in range(5):
            client.post("/generate", json=body).raise_for_status()
        sockets = list(data_dir.rglob("*.sock"))
        server = redis.Redis(unix_socket_path=str(sockets[0]))
        before = server.info("commandstats")
        overheads = []
        for _ in range(arguments.requests):
            started = time.perf_counter()
            reply = client.post("/generate", json=body)
            latency_s = time.perf_counter() - started
            reply.raise_for_status()
            timings = reply.json()["manifest"]["timings"]
            overheads.append(latency_s - timings["encode_s"] - timings["denoise_s"] - timings["decode_s"])
        after = server.info("commandstats")
        figures.append(("service, overhead per request, p50", statistics.median(overheads) * 1e3, "ms"))
        figures.append(("service, overhead per request, p95", statistics.quantiles(overheads, n=20)[-1] * 1e3, "ms"))
        calls = {
            name.removeprefix("cmdstat_"): (stats["calls"] - before.get(name, {"calls": 0})["calls"])
            for name, stats in after.items()
        }
        scripts = sum(calls.get(name, 0) for name in SCRIPT_CALLS)
        figures.append(("service, scripts per job (progress and idle included)", scripts / arguments.requests, "calls"))
        print({name: round(count / arguments.requests, 2) for name, count in calls.items() if count})

        at_start = rss_mib(process)
        quick = {**body, "num_inference_steps": 2}
        with ThreadPoolExecutor(16) as pool:
            codes = list(
                pool.map(
                    lambda i: client.post("/generate", json={**quick, "seed": i}).status_code, range(arguments.soak)
                )
            )
        assert set(codes) == {200}, set(codes)
        at_end = rss_mib(process)
        for role in ("api", "worker"):
            figures.append((f"service, {role} RSS", at_start[role], "MiB"))
            figures.append((f"service, {role} RSS after {arguments.soak} requests", at_end[role], "MiB"))

    for figure, value, unit in figures:
        print(f"{figure:64s} {value:10.2f} {unit}")
    if arguments.record:
        record(figures, "fastapi", "redis")


if __name__ == "__main__":
    main()
