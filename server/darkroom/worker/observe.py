"""What a worker's metrics and traces see of its state, its ticks and finished jobs, and the rate that follows from the
ticks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

from darkroom import metrics, tracing
from darkroom.engine.events import Event, Failed, Finished, TickReport

_STATES = ("starting", "ready", "draining")
_NEW_TICKS_WEIGHT = 0.1


class Rates:
    """How much cost (model rows × latent pixels of one evaluation) a second of ticks makes, by model.

    Each batch shape has a running mean; a model's rate is its best one, as ticks that are not full say little of what
    the worker can do.
    """

    def __init__(self) -> None:
        self._means: dict[str, dict[tuple[int, int, int], float]] = defaultdict(dict)

    def note(self, report: TickReport) -> None:
        choice = report.choice
        if report.seconds <= 0:
            return
        means, shape = self._means[choice.key.model], (choice.bucket, choice.key.height, choice.key.width)
        rate = choice.model_rows * choice.key.height * choice.key.width / report.seconds
        means[shape] = means.get(shape, rate) + _NEW_TICKS_WEIGHT * (rate - means.get(shape, rate))

    def by_model(self) -> dict[str, float]:
        """Cost per second, for each model that has had a tick."""
        return {model: max(means.values()) for model, means in self._means.items()}


def observe_state(state: str) -> None:
    """Say which of starting, ready and draining this worker is in."""
    for name in _STATES:
        metrics.WORKER_STATE.labels(name).set(name == state)


def observe_tick(report: TickReport) -> None:
    """Count one tick. Runs on the engine's thread: increments only."""
    choice = report.choice
    metrics.TICKS.inc()
    metrics.TICK_SECONDS.labels(choice.bucket).observe(report.seconds)
    metrics.TICK_ROWS.observe(choice.model_rows)
    metrics.TICK_PADDED_ROWS.observe(choice.bucket - choice.model_rows)
    metrics.PADDED_ROWS.inc(choice.bucket - choice.model_rows)
    metrics.ROW_STEPS.inc(report.num_rows)
    for reason, rows in report.not_taken.items():
        metrics.ROWS_NOT_TAKEN.labels(reason).inc(rows)


def trace_tick(report: TickReport, traces: Mapping[tuple[str, int], tracing.JobTrace]) -> None:
    """Add the span of a tick if any of its jobs is among `traces`, by id and attempt."""
    jobs = [traces[key] for job, *_ in report.progress if (key := (job.id, job.attempt)) in traces]
    if not jobs:
        return
    choice = report.choice
    attributes: dict[str, str | int] = {
        "darkroom.model": choice.key.model,
        "darkroom.rows": report.num_rows,
        "darkroom.model_rows": choice.model_rows,
        "darkroom.bucket": choice.bucket,
        "darkroom.padded_rows": choice.bucket - choice.model_rows,
        "darkroom.joined": report.joined,
        "darkroom.left": report.left,
    }
    tracing.add_tick(jobs, report.ended_s - report.seconds, report.ended_s, attributes)


def observe_end(event: Event, outcome: str, held_s: float) -> None:
    """Count a job's end, `held_s` seconds after its claim, and where its time went."""
    waited_s = (event.job.claimed_at_ms - event.job.created_at_ms) / 1000
    metrics.JOBS_FINISHED.labels(outcome).inc()
    metrics.JOB_SECONDS.labels(outcome).observe(waited_s + held_s)
    if isinstance(event, Failed):
        metrics.JOBS_FAILED.labels(event.failure.code).inc()
    if isinstance(event, Finished):
        timings = event.result.timings
        metrics.IMAGES.inc(len(event.images))
        metrics.PIXELS.inc(sum(image.width * image.height for image in event.result.images))
        metrics.QUEUE_WAIT_SECONDS.observe(waited_s)
        metrics.ENCODE_SECONDS.observe(timings.encode_s)
        metrics.DENOISE_SECONDS.observe(timings.denoise_s)
        metrics.DECODE_SECONDS.observe(timings.decode_s)
        metrics.IMAGE_ENCODE_SECONDS.observe(timings.image_encode_s)


def trace_end(trace: tracing.JobTrace, event: Event, outcome: str, settling_since_s: float) -> None:
    """End a job's spans, its phases included, once its end is stored."""
    if isinstance(event, Finished):
        for phase, interval in event.phases.items():
            trace.add(phase, *interval)
    trace.add("store", settling_since_s, time.monotonic())
    trace.end(outcome, event.failure.code if isinstance(event, Failed) else None)
