"""What tracing costs a worker for each tick: `python -m benchmarks.tracing [--ticks 20000] [--record]`.

A worker without an engine is told of ticks at once, as its asyncio loop is told of real ones; nothing of this runs on
the tick's own thread. CPU time is the whole process's, so it has the encoding and the sending of spans in it. They go
to a server in another process that throws them away.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import msgspec
from darkroom import logs, tracing
from darkroom.config import Settings
from darkroom.engine.batcher import BatchKey, Choice
from darkroom.engine.events import TickReport
from darkroom.jobs import GenerationRequest, Job, new_job_id
from darkroom.worker.worker import Worker

from benchmarks.record import record

SINK = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
server = HTTPServer(("127.0.0.1", 0), Sink)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
REQUEST = GenerationRequest(
    prompt="a red fox",
    model="none",
    width=512,
    height=512,
    num_inference_steps=20,
    guidance_scale=5.0,
    seed=7,
    sampler="dpmpp_2m",
    sigma_schedule="karras",
)


def jobs_of(count: int, *, are_sampled: bool) -> list[Job]:
    jobs = [Job(id=new_job_id(), request=REQUEST, attempt=1) for _ in range(count)]
    if not are_sampled:
        return jobs
    contexts = (f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01" for _ in jobs)
    return [msgspec.structs.replace(job, traceparent=context) for job, context in zip(jobs, contexts, strict=True)]


def follow(worker: Worker, job: Job) -> None:
    """What a claim does for the traces."""
    if (trace := tracing.follow(job, time.monotonic())) is not None:
        worker._traces[job.id, job.attempt] = trace


async def cost_of_ticks(settings: Settings, jobs: list[Job], num_ticks: int) -> tuple[float, float]:
    """Microseconds that one tick holds the loop up for, and CPU microseconds that it costs the process in all."""
    engine: Any = SimpleNamespace(models={}, batcher=SimpleNamespace(max_model_rows=16), resident_model_rows=int)
    worker = Worker(settings, SimpleNamespace(), lambda **_: engine)  # type: ignore[arg-type]
    for job in jobs:
        follow(worker, job)
    choice = Choice(BatchKey("none", 64, 64), tuple(range(len(jobs))), 2 * len(jobs), 16)
    held_s, cpu_s = 0.0, time.process_time()
    for step in range(num_ticks):
        report = TickReport(
            choice,
            seconds=0.02,
            ended_s=time.monotonic(),
            num_rows=len(jobs),
            joined=0,
            left=0,
            not_taken={},
            progress=[(job, step % 20, 20) for job in jobs],
        )
        began_s = time.perf_counter()
        worker._note_tick(report)
        held_s += time.perf_counter() - began_s
        if step % 20 == 19:
            # A job has so many ticks; and its links must not grow for ever.
            for job in jobs:
                worker._forget(job)
                follow(worker, job)
            await asyncio.sleep(0.01)  # so that spans are sent as they come and none is dropped
    tracing.shutdown(30)
    return held_s / num_ticks * 1e6, (time.process_time() - cpu_s) / num_ticks * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ticks", type=int, default=20000)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    logs.configure("error", process="benchmark")
    figures = []
    with subprocess.Popen([sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True) as sink:
        assert sink.stdout is not None
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{sink.stdout.readline().strip()}"
        try:
            for name, tracing_is, count, are_sampled in (
                ("off", "off", 8, False),
                ("on, none of 8 jobs sampled", "on", 8, False),
                ("on, 1 job, sampled", "on", 1, True),
                ("on, 8 jobs, all sampled", "on", 8, True),
            ):
                settings = Settings(redis_url=None, tracing=tracing_is)
                tracing.configure(settings, "benchmark")
                held_us, cpu_us = asyncio.run(
                    cost_of_ticks(settings, jobs_of(count, are_sampled=are_sampled), arguments.ticks)
                )
                print(f"{name:<28} {held_us:8.1f} µs of the loop, {cpu_us:8.1f} µs of CPU in all, a tick")
                figures.append((f"tracing {name}, loop per tick", held_us, "µs"))
                figures.append((f"tracing {name}, CPU per tick", cpu_us, "µs"))
        finally:
            sink.kill()
    if arguments.record:
        record(figures, "opentelemetry-sdk")


if __name__ == "__main__":
    main()
