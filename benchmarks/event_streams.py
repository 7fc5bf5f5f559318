"""What open event streams cost an API process: `python -m benchmarks.event_streams [--streams 500] [--record]`.

Clients follow a job each, none of which is ever run. Measured are the milliseconds from a new connection to the first
byte of an event, one client after the other, before and while the other streams are open, for `GET /jobs/{id}/events`
and for a stream of OpenAI's API; and how much memory the process has for the open streams.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
from darkroom.config import Settings
from darkroom.jobs import GenerationRequest, Job, ModelCard, new_job_id
from darkroom.queue import JobQueue
from darkroom.queue.embedded import EmbeddedRedis
from darkroom.sampling import SAMPLERS, SIGMA_SCHEDULES

from benchmarks.record import Figure, record
from benchmarks.service import free_port

START_S = 60.0
CARD = ModelCard(
    id="none",
    family="none",
    weights_hash="0" * 16,
    width=64,
    height=64,
    num_inference_steps=20,
    guidance_scale=5.0,
    sampler="dpmpp_2m",
    sigma_schedule="karras",
    samplers=list(SAMPLERS),
    sigma_schedules=list(SIGMA_SCHEDULES),
    size_multiple=16,
    vae_scale_factor=4,
    max_width=128,
    max_height=128,
)
REQUEST = GenerationRequest(
    prompt="a red fox",
    model=CARD.id,
    width=64,
    height=64,
    num_inference_steps=20,
    guidance_scale=5.0,
    seed=7,
    sampler="dpmpp_2m",
    sigma_schedule="karras",
)


@contextlib.asynccontextmanager
async def api_process(redis_url: str, directory: str) -> AsyncIterator[tuple[psutil.Process, int]]:
    """An API process of its own, and its port."""
    port = free_port()
    env = {**os.environ, "DARKROOM_REDIS_URL": redis_url, "DARKROOM_DATA_DIR": directory, "DARKROOM_LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "darkroom", "api", "--port", str(port)]
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(START_S), httpx.AsyncClient(trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    await client.get(f"http://127.0.0.1:{port}/health/live")
                    break
                await asyncio.sleep(0.05)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        await process.wait()


async def open_stream(port: int, call: bytes) -> tuple[float, asyncio.StreamWriter]:
    """Begin to follow, and return the seconds until the first byte of the reply's body with what closes it."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(call)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"expected 200, got {head.splitlines()[0].decode()}")
    await reader.readexactly(1)
    return time.perf_counter() - began, writer


def following(job_id: str) -> bytes:
    return f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: darkroom\r\n\r\n".encode()


def openai_call() -> bytes:
    body = b'{"prompt": "a red fox", "stream": true, "partial_images": 3}'
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: darkroom\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def first_bytes_ms(port: int, calls: list[bytes]) -> list[float]:
    """Of each call, one after the other."""
    seconds = []
    for call in calls:
        took_s, writer = await open_stream(port, call)
        seconds.append(took_s)
        writer.close()
        await writer.wait_closed()
    return [1000 * one for one in seconds]


async def measure(num_streams: int, num_samples: int) -> list[Figure]:
    figures = []
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedRedis(Settings(data_dir=Path(directory), redis_url=None)) as server,
    ):
        queue = await JobQueue.connect(Settings(data_dir=Path(directory), redis_url=server.url), server.url)
        await queue.register("nobody", [CARD])
        jobs = [Job(id=new_job_id(), request=REQUEST) for _ in range(num_streams)]
        for job in jobs:
            await queue.enqueue(job, result_bytes=1 << 16)
        calls = {
            "GET /jobs/{job_id}/events": [following(job.id) for job in jobs[:num_samples]],
            "POST /v1/images/generations": [openai_call()] * num_samples,
        }
        async with api_process(server.url, directory) as (process, port):
            for each in calls.values():
                await first_bytes_ms(port, each[:20])
            before_bytes = process.memory_info().rss
            for when in ("idle", f"{num_streams} streams open"):
                writers = []
                if when != "idle":
                    for job in jobs:
                        writers.append((await open_stream(port, following(job.id)))[1])
                for call, each in calls.items():
                    await queue.heartbeat("nobody")
                    took_ms = await first_bytes_ms(port, each)
                    spread = statistics.quantiles(took_ms, n=20, method="inclusive")
                    detail = f"median {statistics.median(took_ms):.1f}, most {max(took_ms):.1f} of {len(took_ms)}"
                    figures.append(Figure(f"first byte, p95, {call}, {when}", spread[-1], "ms", detail=detail))
                if writers:
                    grown_mb = (process.memory_info().rss - before_bytes) / 1e6
                    figures.append(Figure(f"memory of {num_streams} idle event streams", grown_mb, "MB"))
                for writer in writers:
                    writer.close()
        await queue.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.streams, arguments.samples))
    for figure in figures:
        print(f"{figure.name:60} {figure.value:8.2f} {figure.unit}  {figure.detail}")
    if arguments.record:
        record(figures, "fastapi", "uvicorn", "redis")


if __name__ == "__main__":
    main()
