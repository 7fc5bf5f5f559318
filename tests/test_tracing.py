"""Traces from HTTP through the queue to the worker, and what log lines say of a request.

A collector in this process takes what OpenTelemetry's own exporter sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import structlog
import torch
from darkroom import tracing
from darkroom.api.server import _STOP_AFTER_S
from darkroom.config import Settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.engine.engine import Engine
from darkroom.engine.events import Failed
from darkroom.jobs import Failure, GenerationRequest, Job, JobState, Priority, decode, encode, new_job_id
from darkroom.queue import JobQueue
from darkroom.queue.notices import Notices
from darkroom.up import STOP_TIMEOUTS_S
from darkroom.worker.main import LAST_SPANS_S
from darkroom.worker.worker import HAND_BACK_STOP_S, Worker

from tests.support.collector import Collector, Span
from tests.support.http import in_process
from tests.support.instant_worker import InstantWorker, card
from tests.support.tiny_models import write_tiny_model

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "quarrelsome heron"
PROMPTS = {"prompt": f"a {SECRET} at dawn", "negative_prompt": f"no {SECRET} at dusk"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"tracing": "on", "num_threads": 1, "encode_threads": 1})


@pytest.fixture
def traced(collector: Collector, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """This process traces, and its spans arrive here."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    tracing.configure(settings, "darkroom-test")
    yield collector
    tracing.shutdown(5)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=5)
    card = {"id": "tiny", "num_inference_steps": 3, "width": 64, "height": 64}
    (directory / "darkroom.json").write_text(json.dumps(card))
    return directory


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(model_path)
    torch.set_num_threads(threads)


@contextlib.asynccontextmanager
async def serving(
    settings: Settings, queue: JobQueue, model: DiffusionModel, make_engine: Callable[..., Engine] = Engine
) -> AsyncIterator[Worker]:
    worker = Worker(settings, queue, functools.partial(make_engine, {model.id: model}, settings))
    ready = asyncio.Event()
    running = asyncio.create_task(worker.run(ready.set))
    await asyncio.wait_for(ready.wait(), 20)
    try:
        yield worker
    finally:
        worker.drain()
        await asyncio.wait_for(running, 20)


def slow_engine(*arguments: Any, **keywords: Any) -> Engine:
    """An engine whose every tick takes at least 20 ms, so that a test can act while a job runs."""
    engine = Engine(*arguments, **keywords)
    gate, tick = threading.Event(), engine._tick

    def slow(*rest: Any) -> None:
        gate.wait(0.02)
        tick(*rest)

    engine._tick = slow  # type: ignore[method-assign]
    return engine


def failing_engine(*arguments: Any, **keywords: Any) -> Engine:
    """An engine in which every job fails for want of memory."""
    engine = Engine(*arguments, **keywords)

    def fail(_model: object, jobs: list[Any]) -> dict[Any, Any]:
        for active in jobs:
            engine._end(active, Failed(active.job, Failure(code="out_of_memory", message="too large")))
        return {}

    engine._joiner._encode = fail  # type: ignore[method-assign]
    return engine


def ended_jobs(count: int) -> Callable[[list[Span]], bool]:
    return lambda spans: sum(span.name == "job" for span in spans) == count


async def draw(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return await client.post("/generate", json={**PROMPTS, "seed": 3, **fields}, headers=headers)


async def test_a_request_is_one_trace_from_the_call_to_the_stored_picture(
    traced: Collector, settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with serving(settings, queue, model), in_process(settings, queue) as client:
        reply = await draw(client, sampler="heun")
        assert reply.status_code == 200
    traced.wait_for(ended_jobs(1))
    traced.wait_for(lambda spans: any(span.kind == "server" for span in spans))

    call, enqueue, job = traced.one("POST /generate"), traced.one("enqueue"), traced.one("job")
    phases = [traced.one(name) for name in ("encode", "denoise", "decode", "image_encode", "store")]
    wait = traced.one("queue.wait")
    assert {span.trace_id for span in (call, enqueue, wait, job, *phases)} == {call.trace_id}
    assert (call.parent_id, enqueue.parent_id) == ("", call.span_id)
    assert (wait.parent_id, job.parent_id) == (enqueue.span_id, enqueue.span_id)
    assert {phase.parent_id for phase in phases} == {job.span_id}
    assert (call.kind, enqueue.kind, job.kind) == ("server", "producer", "consumer")
    assert call.attributes["http.response.status_code"] == 200

    job_id = reply.json()["job_id"]
    for span, operation in ((enqueue, "send"), (job, "process")):
        assert span.attributes["messaging.system"] == "redis"
        assert span.attributes["messaging.destination.name"] == "tiny"
        assert span.attributes["messaging.operation.type"] == operation
        assert span.attributes["messaging.message.id"] == job_id
    assert (job.attributes["darkroom.outcome"], job.attributes["darkroom.attempt"]) == ("succeeded", 1)

    # Phases follow each other inside the job, and the wait ends where it begins.
    assert wait.ended_ns == job.began_ns
    times = [time for phase in phases for time in (phase.began_ns, phase.ended_ns)]
    assert [job.began_ns, *times, job.ended_ns] == sorted([job.began_ns, *times, job.ended_ns])

    # Heun evaluates 2 × 3 - 1 times.
    ticks = traced.named("tick")
    assert [tick.links for tick in ticks] == [[job.key]] * 5
    assert len({tick.trace_id for tick in ticks} - {job.trace_id}) == 5
    assert phases[1].links == [tick.key for tick in ticks]
    assert phases[1].ended_ns == pytest.approx(ticks[-1].ended_ns, abs=1e6)
    assert ticks[0].attributes == {
        "darkroom.model": "tiny",
        "darkroom.rows": 1,
        "darkroom.model_rows": 2,
        "darkroom.bucket": 2,
        "darkroom.padded_rows": 0,
        "darkroom.joined": 1,
        "darkroom.left": 0,
    }
    assert [tick.attributes["darkroom.left"] for tick in ticks] == [0, 0, 0, 0, 1]
    assert not any(SECRET.encode() in body for body in traced.bodies)


async def test_a_callers_trace_is_continued(
    traced: Collector, settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with serving(settings, queue, model), in_process(settings, queue) as client:
        assert (await draw(client, {"traceparent": f"00-{TRACE}-{CALLER}-01"})).status_code == 200
    traced.wait_for(ended_jobs(1))
    traced.wait_for(lambda spans: any(span.kind == "server" for span in spans))
    assert traced.one("POST /generate").parent_id == CALLER
    assert {span.trace_id for span in traced.spans if span.name != "tick"} == {TRACE}


async def test_ticks_that_two_jobs_share_link_to_both(
    traced: Collector, settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with in_process(settings, queue) as client:
        await queue.register("idle", [model.card])
        for seed in range(2):
            assert (await draw(client, mode="async", seed=seed)).status_code == 202
        unsampled = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
        assert (await draw(client, unsampled, mode="async", seed=2)).status_code == 202
        await queue.unregister("idle")
        async with serving(settings, queue, model):
            await asyncio.to_thread(traced.wait_for, ended_jobs(2))
    jobs = {job.key for job in traced.named("job")}
    assert len({trace_id for trace_id, _ in jobs}) == 2
    shared = [tick for tick in traced.named("tick") if tick.attributes["darkroom.rows"] == 3]
    assert len(shared) >= 2
    assert all(set(tick.links) == jobs for tick in shared)


async def test_what_is_not_sampled_is_neither_carried_nor_sent(
    traced: Collector, settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with serving(settings, queue, model) as worker, in_process(settings, queue) as client:
        reply = await draw(client, {"traceparent": f"00-{TRACE}-{CALLER}-00"})
        assert reply.status_code == 200
        assert worker._traces == {}
        assert (await queue.status(reply.json()["job_id"])).job.traceparent is msgspec.UNSET
    tracing.shutdown(5)
    assert traced.spans == []


async def test_health_checks_and_queries_stay_out_of_traces(
    traced: Collector, settings: Settings, queue: JobQueue
) -> None:
    async with in_process(settings, queue) as client:
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/models", params={"prompt": SECRET})).status_code == 200
    tracing.shutdown(5)
    (call,) = traced.spans
    assert (call.name, call.attributes["url.query"]) == ("GET /models", "REDACTED")
    assert not any(SECRET.split()[0].encode() in body for body in traced.bodies)


async def test_a_failed_job_is_an_error_with_its_code_and_a_cancelled_one_is_not(
    traced: Collector, settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with in_process(settings, queue) as client:
        async with serving(settings, queue, model, failing_engine):
            assert (await draw(client)).status_code == 507
        async with serving(settings, queue, model, slow_engine):
            reply = await draw(client, mode="async", num_inference_steps=150)
            async for event in queue.events(reply.json()["job_id"]):
                if event.kind == JobState.RUNNING.value:
                    await client.delete(reply.json()["url"])
            assert (await draw(client, num_inference_steps=150, deadline_s=0.5)).status_code == 504
    traced.wait_for(ended_jobs(3))
    outcomes = {job.attributes["darkroom.outcome"]: job for job in traced.named("job")}
    assert outcomes.keys() == {"failed", "cancelled", "expired"}
    assert [outcome for outcome, job in outcomes.items() if job.is_error] == ["failed"]
    assert outcomes["failed"].attributes["error.type"] == "out_of_memory"


async def test_a_job_that_is_handed_back_goes_on_in_its_trace(
    traced: Collector, settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with in_process(settings, queue) as client:
        async with serving(settings, queue, model, slow_engine):
            job_id = (await draw(client, mode="async", num_inference_steps=100)).json()["job_id"]
            async for event in queue.events(job_id):
                if event.kind == JobState.RUNNING.value:
                    break
        async with serving(settings, queue, model) as worker:
            assert (await queue.wait(job_id, 30)).state is JobState.SUCCEEDED
        assert worker._traces == {}
    traced.wait_for(ended_jobs(2))
    first, second = traced.named("job")
    assert [job.attributes["darkroom.outcome"] for job in (first, second)] == ["handed_back", "succeeded"]
    assert [job.attributes["darkroom.attempt"] for job in (first, second)] == [1, 2]
    assert (first.trace_id, first.parent_id) == (second.trace_id, second.parent_id)


async def test_a_refused_job_is_an_error_in_its_trace_and_names_no_job(
    traced: Collector, settings: Settings, queue: JobQueue
) -> None:
    settings = settings.model_copy(update={"max_queue_jobs": 1})
    crowded = await JobQueue.connect(settings, str(settings.redis_url))
    try:
        async with in_process(settings, crowded) as client:
            await crowded.register("idle", [card()])
            assert (await draw(client, mode="async")).status_code == 202
            assert (await draw(client, mode="async", seed=4)).status_code == 429
    finally:
        await crowded.close()
    traced.wait_for(lambda spans: len(spans) == 4)
    refused = next(span for span in traced.named("enqueue") if span.is_error)
    assert refused.attributes["error.type"] == "queue_full"
    assert "messaging.message.id" not in refused.attributes


def test_a_damaged_context_in_a_job_is_no_trace(traced: Collector) -> None:
    for damaged in ("", "nonsense", f"00-{'0' * 32}-{CALLER}-01", f"00-{TRACE}-{CALLER}"):
        assert tracing.follow(job_with(damaged), time.monotonic()) is None


REQUEST = GenerationRequest(
    prompt="the red cat",
    model="tiny",
    width=64,
    height=64,
    num_inference_steps=4,
    guidance_scale=5.0,
    seed=7,
    sampler="euler",
    sigma_schedule="simple",
)


def job_with(traceparent: str | msgspec.UnsetType = msgspec.UNSET) -> Job:
    return Job(id=new_job_id(), request=REQUEST, traceparent=traceparent)


class JobBeforeTracing(msgspec.Struct, frozen=True, kw_only=True):
    """The stored message as the releases before tracing write and read it."""

    id: str
    request: GenerationRequest
    priority: Priority = Priority.NORMAL
    created_at_ms: int = 0
    claimed_at_ms: int = 0
    deadline_at_ms: int | None = None
    cost: float = 0.0
    tenant: str = "default"
    attempt: int = 0
    failures: int = 0
    num_checkpoints: int = 0
    version: int = 1


def test_messages_are_read_by_releases_with_and_without_tracing() -> None:
    traceparent = f"00-{TRACE}-{CALLER}-01"
    sampled, plain = job_with(traceparent), job_with()
    old = decode(encode(sampled), JobBeforeTracing)
    assert (old.id, old.request) == (sampled.id, sampled.request)
    assert decode(encode(JobBeforeTracing(id=plain.id, request=REQUEST)), Job) == plain
    assert decode(encode(sampled), Job).traceparent == traceparent
    assert b"traceparent" not in encode(plain)


async def test_without_tracing_a_job_carries_nothing(settings: Settings, queue: JobQueue) -> None:
    await queue.register("idle", [card()])
    async with in_process(settings.model_copy(update={"tracing": "off"}), queue) as client:
        reply = await draw(client, {"traceparent": f"00-{TRACE}-{CALLER}-01"}, mode="async")
    assert (await queue.status(reply.json()["job_id"])).job.traceparent is msgspec.UNSET


def test_without_tracing_neither_the_sdk_for_traces_nor_the_exporter_is_loaded() -> None:
    """The SDK's metrics may be: the Redis client looks for them."""
    code = """
import sys
from darkroom import tracing
from darkroom.api.app import create_app
from darkroom.config import Settings
import darkroom.worker.worker
settings = Settings(redis_url="redis://127.0.0.1:1")
tracing.configure(settings, "darkroom-api")
create_app(settings)
tracing.shutdown(1)
print(*[name for name in ("opentelemetry.sdk.trace", "opentelemetry.exporter") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("command", ["api", "worker", "up"])
def test_tracing_without_the_extra_stops_the_start_with_one_line(command: str, tmp_path: Path) -> None:
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.argv = ["darkroom", "{command}"]
from darkroom.cli import main
main()
"""
    env = {**os.environ, "DARKROOM_TRACING": "on", "DARKROOM_DATA_DIR": str(tmp_path)}
    if command != "up":
        env["DARKROOM_REDIS_URL"] = "redis://127.0.0.1:1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == "darkroom: DARKROOM_TRACING=on needs OpenTelemetry's SDK: pip install 'darkroom[tracing]'"


async def test_a_collector_that_is_away_fails_no_request_and_holds_up_no_end(
    collector: Collector, settings: Settings, queue: JobQueue, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector.close()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    tracing.configure(settings, "darkroom-test")
    async with serving(settings, queue, model), in_process(settings, queue) as client:
        assert (await draw(client)).status_code == 200
    began = time.monotonic()
    tracing.shutdown(0.3)
    assert time.monotonic() - began < 5, "the library's own limit is 30 s"


def test_the_last_spans_fit_into_what_is_granted_for_an_end() -> None:
    assert STOP_TIMEOUTS_S["api"] > _STOP_AFTER_S
    assert STOP_TIMEOUTS_S["worker"] > HAND_BACK_STOP_S + LAST_SPANS_S


class Process:
    """A `darkroom` process and the lines that it logs."""

    def __init__(self, settings: Settings, *arguments: str, **env: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("DARKROOM_", "OTEL_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "darkroom", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **clean,
                "DARKROOM_REDIS_URL": str(settings.redis_url),
                "DARKROOM_SHARD": settings.shard,
                "DARKROOM_PORT": "0",
                "DARKROOM_NUM_THREADS": "1",
                "DARKROOM_LOG_LEVEL": "debug",
                **env,
            },
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in map(json.loads, self.lines) if event["event"] == name]

    def wait_for(self, name: str) -> dict[str, Any]:
        """Wait until an event of that name is logged."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.events(name), 60), self.lines
        return self.events(name)[0]

    def stop(self) -> float:
        """Ask it to end, and return the seconds that it took. Every line must be a JSON object."""
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(20) == 0, self.lines
        seconds = time.monotonic() - began
        self._reader.join()
        assert all(isinstance(json.loads(line), dict) for line in self.lines)
        return seconds

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()


@pytest.fixture
def start(settings: Settings) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start_one(*arguments: str, **env: str) -> Process:
        started.append(Process(settings, *arguments, **env))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()


@pytest.mark.timeout(200)
def test_processes_share_a_trace_log_its_id_and_end_in_time_when_the_collector_hangs(
    start: Callable[..., Process], collector: Collector, model_path: Path
) -> None:
    env = {
        "DARKROOM_TRACING": "on",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
    }
    api, worker = start("api", **env), start("worker", "--model", str(model_path), **env)
    url = api.wait_for("api_listening")["url"]
    worker.wait_for("worker_ready")
    body = {**PROMPTS, "seed": 3}
    reply = httpx.post(f"{url}/generate", json=body, headers={"X-Request-Id": "mine-1"}, timeout=30)
    assert (reply.status_code, reply.headers["x-request-id"]) == (200, "mine-1")
    collector.wait_for(ended_jobs(1))
    collector.wait_for(lambda spans: any(span.kind == "server" for span in spans))
    call, job = collector.one("POST /generate"), collector.one("job")
    assert (call.service, job.service) == ("darkroom-api", "darkroom-worker")
    assert call.trace_id == job.trace_id
    assert call.attributes["darkroom.request_id"] == "mine-1"

    worker.wait_for("job_ended")
    job_id = reply.json()["job_id"]
    lines = [process.wait_for(name) for process, name in (
        (api, "job_accepted"), (api, "job_answered"), (worker, "job_claimed"), (worker, "job_ended")
    )]  # fmt: skip
    assert {(line["job_id"], line["trace_id"]) for line in lines} == {(job_id, call.trace_id)}
    assert {(line["request_id"], line["span_id"]) for line in lines[:2]} == {("mine-1", call.span_id)}

    collector.answers.clear()
    assert httpx.post(f"{url}/generate", json=body, timeout=30).status_code == 200
    assert worker.stop() < STOP_TIMEOUTS_S["worker"]
    assert api.stop() < STOP_TIMEOUTS_S["api"]
    assert not [line for line in api.lines + worker.lines if SECRET in line]


def ask_in_every_way(url: str) -> None:
    """Calls that carry the prompts and succeed, are refused, or make no sense."""
    with httpx.Client(base_url=url, timeout=20) as client:
        assert client.post("/generate", json=PROMPTS).status_code == 200
        assert client.post("/generate", json={**PROMPTS, "mode": "async"}).status_code == 202
        assert client.post("/generate", json={**PROMPTS, "width": 7}).status_code == 422
        assert client.post("/generate", json={**PROMPTS, SECRET: SECRET}).status_code == 422
        assert client.post("/generate", json={"prompt": [SECRET]}).status_code == 422
        assert client.post("/generate", json={**PROMPTS, "model": SECRET}).status_code == 404
        broken = json.dumps(PROMPTS)[:-1]
        assert client.post("/generate", content=broken, headers={"content-type": "application/json"}).status_code == 400
        assert client.post("/generate", content=SECRET, headers={"content-type": "text/plain"}).status_code == 415
        assert client.get("/models", params={"prompt": SECRET}).status_code == 200


@pytest.mark.parametrize("asked", [False, True], ids=["by default", "asked for"])
async def test_prompts_are_logged_only_when_asked_for(
    start: Callable[..., Process], settings: Settings, queue: JobQueue, asked: bool
) -> None:
    async with InstantWorker(queue).running():
        api = start("api", DARKROOM_LOG_PROMPTS=str(asked))
        url = (await asyncio.to_thread(api.wait_for, "api_listening"))["url"]
        await asyncio.to_thread(ask_in_every_way, url)
        await asyncio.to_thread(api.stop)
    accepted = api.events("job_accepted")
    assert len(accepted) == 2
    telling = [json.loads(line) for line in api.lines if SECRET in line]
    assert telling == (accepted if asked else [])
    if asked:
        assert all(PROMPTS.items() <= line.items() for line in accepted)
    # Without tracing, a call still has an id of its own in all its lines, and no line has a trace.
    assert len({line["request_id"] for line in accepted}) == 2
    assert accepted[0]["request_id"] == api.events("job_answered")[0]["request_id"]
    assert not [line for line in api.lines if "trace_id" in line]


@pytest.mark.parametrize("sent", [None, "", "two words", "ü", "x" * 129, 'a"b'])
async def test_a_reply_has_a_request_id_of_ours_where_the_clients_cannot_be_taken(
    settings: Settings, queue: JobQueue, sent: str | None
) -> None:
    async with in_process(settings, queue) as client:
        headers = {} if sent is None else {"X-Request-Id": sent.encode()}
        given = [(await client.get(path, headers=headers)).headers["x-request-id"] for path in ("/models", "/nowhere")]
    assert all(len(request_id) == 32 and int(request_id, 16) for request_id in given)
    assert given[0] != given[1]


async def test_the_queues_listener_takes_nothing_from_the_call_that_starts_it(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives on, and would log that call's request_id for ever."""
    listen, inherited = Notices._listen, list[dict[str, Any]]()

    async def noted(notices: Notices) -> None:
        inherited.append(structlog.contextvars.get_contextvars())
        await listen(notices)

    monkeypatch.setattr(Notices, "_listen", noted)
    with structlog.contextvars.bound_contextvars(request_id="the first call's"):
        await queue._notices.subscribe("ended")
    assert inherited == [{}]
