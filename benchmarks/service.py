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
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import redis

from benchmarks.record import record

IDLE_S = 5.0


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


def count_commands(server: redis.Redis, action: Callable[[], object]) -> int:
    """Commands that clients sent to `server` during `action`; those that scripts call inside it do not count."""
    count, is_over = 0, threading.Event()
    with server.monitor() as monitor:

        def listen() -> None:
            nonlocal count
            while not is_over.is_set():
                command = monitor.next_command()
                count += command["client_type"] != "lua"

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        action()
        is_over.set()
        server.ping()
        listener.join()
    return count - 1


def soak(client: httpx.Client, body: dict[str, object], count: int) -> None:
    """`count` requests with seeds of their own, sixteen at a time."""
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda i: client.post("/generate", json={**body, "seed": i}).status_code, range(count)))
    assert set(codes) == {200}, set(codes)


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
        server = redis.Redis(unix_socket_path=str(next(data_dir.rglob("*.sock"))))
        overheads = []
        for _ in range(arguments.requests):
            started = time.perf_counter()
            reply = client.post("/generate", json=body)
            latency_s = time.perf_counter() - started
            reply.raise_for_status()
            timings = reply.json()["manifest"]["timings"]
            overheads.append(latency_s - timings["encode_s"] - timings["denoise_s"] - timings["decode_s"])
        figures.append(("service, overhead per request, p50", statistics.median(overheads) * 1e3, "ms"))
        figures.append(("service, overhead per request, p95", statistics.quantiles(overheads, n=20)[-1] * 1e3, "ms"))
        idle_per_s = count_commands(server, lambda: time.sleep(IDLE_S)) / IDLE_S
        busy_s = -time.perf_counter()
        commands = count_commands(server, lambda: [client.post("/generate", json=body) for _ in range(30)])
        busy_s += time.perf_counter()
        per_job = (commands - idle_per_s * busy_s) / 30
        figures.append(("service, Redis round trips per 20-step job, progress included", per_job, "commands"))
        figures.append(("service, Redis round trips while idle", idle_per_s, "commands/s"))

        quick = {**body, "num_inference_steps": 2}
        soak(client, quick, arguments.soak)
        at_start = rss_mib(process)
        soak(client, quick, arguments.soak)
        at_end = rss_mib(process)
        for role in ("api", "worker"):
            figures.append((f"service, {role} RSS after warm-up", at_start[role], "MiB"))
            figures.append((f"service, {role} RSS after {arguments.soak} more requests", at_end[role], "MiB"))

    for figure, value, unit in figures:
        print(f"{figure:64s} {value:10.2f} {unit}")
    if arguments.record:
        record(figures, "fastapi", "redis")


if __name__ == "__main__":
    main()
