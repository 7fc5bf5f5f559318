"""What the metrics say, and that it is true."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from darkroom import metrics
from darkroom.api.service import Service
from darkroom.config import Settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.engine.batcher import Batcher, BatchKey, Choice
from darkroom.engine.engine import Engine
from darkroom.engine.events import TickReport
from darkroom.errors import HTTP_STATUS
from darkroom.jobs import JobState, Priority
from darkroom.queue import JobQueue
from darkroom.worker.observe import Rates, observe_tick

from tests.support.engines import job_for, run_jobs
from tests.support.http import in_process
from tests.support.instant_worker import InstantWorker, card
from tests.support.jobs import MODEL, end_lease, make_card, make_job
from tests.support.metrics import Change, value
from tests.support.tiny_models import write_tiny_model
from tests.test_worker import enqueue, serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=5))
    torch.set_num_threads(threads)


def test_every_name_has_a_base_unit_and_every_label_a_small_closed_set() -> None:
    allowed = {"version", "python", "method", "route", "status", "priority", "outcome", "reason", "model", "kind"}
    allowed |= {"state", "delivery", "code", "bucket", "where", "operation", "gpu", "xid"}
    for metric in metrics.declared():
        assert metric.name.startswith("darkroom_")
        assert not metric.name.endswith(("_ms", "_minutes", "_mib", "_percent")), metric.name
        assert set(metric.labels) <= allowed, metric
        assert metric.documentation.endswith("."), metric.name


def test_series_of_closed_sets_are_there_before_their_first_event() -> None:
    ends = [state.value for state in JobState if state.is_terminal]
    for outcome in ends:
        assert value("jobs_finished_total", outcome=outcome) is not None
        assert value("job_duration_seconds_count", outcome=outcome) is not None
        assert value("jobs_answered_total", outcome=outcome) is not None
    for priority in Priority:
        assert value("jobs_accepted_total", priority=priority.value) is not None
    for code in HTTP_STATUS:
        assert value("rejects_total", reason=code) is not None


@pytest.mark.parametrize(("kind", "other"), [("api", "resident_rows"), ("worker", "queue_reachable")])
def test_a_process_exports_nothing_that_only_the_other_kind_knows(kind: str, other: str) -> None:
    """A worker that said 0 for the whole queue would look like an outage of it."""
    code = f"from darkroom import metrics; metrics.export_only({kind!r}); print(metrics.exposition()[0].decode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert f"darkroom_{other} " not in done.stdout
    assert "darkroom_dead_letters_total 0.0" in done.stdout


def test_a_tick_says_which_images_it_left_waiting_and_why(model: DiffusionModel, settings: Settings) -> None:
    """Two sizes, and ticks of four model rows: at the first tick one image has the wrong size and one finds no room."""
    jobs = [job_for(model, f"wide-{i}", guidance_scale=3.0) for i in range(3)]
    jobs.append(job_for(model, "small", guidance_scale=3.0, width=32, height=32))
    outcome = run_jobs(model, jobs, settings, batcher=Batcher((4,)))
    first = outcome.ticks[0]
    assert first.choice.model_rows == 4
    assert first.not_taken == {"no_room": 1, "other_shape": 1}
    assert outcome.ticks[-1].not_taken == {}


def test_images_that_join_the_batch_leave_it_again(model: DiffusionModel, settings: Settings) -> None:
    change = Change()

    def cancel_one(engine: Engine, report: TickReport, num_ticks: int) -> None:
        if num_ticks == 2:
            engine.cancel("two")

    jobs = [job_for(model, name, num_inference_steps=6) for name in ("one", "two", "three")]
    run_jobs(model, jobs, settings, on_tick=cancel_one)
    assert change("rows_joined_total") == 3
    assert change("rows_left_total", reason="finished") == 2
    assert change("rows_left_total", reason="ended_early") == 1


def test_prompts_that_were_encoded_before_are_hits(model: DiffusionModel, settings: Settings) -> None:
    change = Change()
    jobs = [job_for(model, str(i), seed=i, guidance_scale=1.0) for i in range(3)]
    run_jobs(model, jobs, settings)
    assert change("prompt_cache_requests_total", outcome="miss") == 1
    run_jobs(model, [jobs[0]], settings.model_copy(update={"prompt_cache_bytes": 0}))
    assert change("prompt_cache_requests_total", outcome="miss") == 2


def report_of(bucket: int, model_rows: int, seconds: float) -> TickReport:
    choice = Choice(BatchKey("tiny", 8, 8), (0,), model_rows, bucket)
    return TickReport(choice, seconds, ended_s=9.0, num_rows=1, joined=0, left=0, not_taken={"no_room": 2}, progress=[])


def test_a_tick_is_counted_with_its_padding_under_its_row_bucket() -> None:
    change = Change()
    observe_tick(report_of(bucket=8, model_rows=5, seconds=0.02))
    assert change("tick_seconds_count", bucket="8") == 1
    assert change("tick_seconds_sum", bucket="8") == pytest.approx(0.02)
    assert (change("tick_rows_sum"), change("tick_padded_rows_sum"), change("padded_rows_total")) == (5, 3, 3)
    assert change("rows_not_taken_total", reason="no_room") == 2


def test_the_rate_of_a_worker_is_that_of_its_best_batch_size() -> None:
    rates = Rates()
    assert rates.by_model() == {}
    for _ in range(50):
        rates.note(report_of(bucket=2, model_rows=2, seconds=0.01))
        rates.note(report_of(bucket=8, model_rows=8, seconds=0.02))
    assert rates.by_model() == {"tiny": pytest.approx(8 * 64 / 0.02)}
    rates.note(report_of(bucket=8, model_rows=8, seconds=0.0))  # a clock may stand still


async def test_a_worker_counts_what_it_claims_holds_and_ends(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    change = Change()
    async with serving(settings.model_copy(update={"max_rows": 4}), queue, model):
        job = await enqueue(queue, job_for(model, "", num_images_per_prompt=2))
        assert (await queue.wait(job.id, 30)).state is JobState.SUCCEEDED
        assert (value("worker_state", state="ready"), value("worker_state", state="draining")) == (1, 0)
        assert value("max_model_rows") == 4
    assert (value("worker_state", state="ready"), value("worker_state", state="draining")) == (0, 1)
    assert value("resident_rows") == 0
    assert (change("images_total"), change("pixels_total")) == (2, 2 * 64 * 64)
    assert change("jobs_claimed_total", delivery="first") == 1
    assert change("job_duration_seconds_count", outcome="succeeded") == 1
    assert change("job_duration_seconds_sum") >= change("denoise_seconds_sum") > 0


async def test_the_gauges_show_the_whole_queue(settings: Settings, queue: JobQueue) -> None:
    service = Service(settings, queue)
    await queue.register("w1", [make_card()])
    await queue.heartbeat("w1", {MODEL: 64.0})
    for _ in range(2):
        await queue.enqueue(make_job(), result_bytes=1000)
    await service.look()
    assert (value("queue_depth", model=MODEL), value("live_workers"), value("queue_reachable")) == (2, 1, 1)
    assert (value("queue_jobs_total", state="accepted"), value("queue_jobs_total", state="failed")) == (2, 0)
    oldest_s = value("queue_oldest_wait_seconds")
    assert oldest_s is not None
    assert 0 <= oldest_s < 20
    used = value("redis_memory_bytes", kind="used")
    assert used is not None
    assert used > 100_000


async def test_what_was_last_seen_of_the_queue_is_not_shown_while_redis_is_away(
    settings: Settings, queue: JobQueue
) -> None:
    await Service(settings, queue).look()
    away = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1"})
    await Service(away, None).look()
    assert value("queue_reachable") == 0
    assert math.isnan(value("queue_in_flight") or 0.0)
    assert value("queue_depth", model=MODEL) is None
    assert value("queue_jobs_total", state="accepted") is None


async def test_jobs_of_lost_workers_are_counted_as_redelivered_and_at_last_as_dead(
    settings: Settings, queue: JobQueue
) -> None:
    settings = settings.model_copy(update={"lease_s": 0.5, "max_failures": 2})
    impatient = await JobQueue.connect(settings, str(settings.redis_url))
    change = Change()
    try:
        await impatient.enqueue(make_job(), result_bytes=1000)
        for _ in range(2):
            [job] = await impatient.claim("w1", [MODEL], 1, 8)
            await end_lease(impatient, job)
            await impatient.reap()
        stats = await impatient.stats()
    finally:
        await impatient.close()
    assert (change("redeliveries_total"), change("dead_letters_total"), stats.dead_letters) == (1, 1, 1)


async def test_the_public_port_has_metrics_only_if_asked(settings: Settings, queue: JobQueue) -> None:
    async with InstantWorker(queue, card()).running():
        async with in_process(settings, queue) as client:
            assert (await client.get("/metrics")).status_code == 404
        asked = settings.model_copy(update={"metrics_public": True})
        async with in_process(asked, queue) as client:
            await client.post("/generate", json={"prompt": "a red fox"})
            reply: httpx.Response = await client.get("/metrics")
            document: dict[str, Any] = (await client.get("/openapi.json")).json()
    assert reply.headers["content-type"].startswith("text/plain")
    assert 'darkroom_http_requests_total{method="POST",route="/generate",status="200"}' in reply.text
    assert "/metrics" not in document["paths"]
