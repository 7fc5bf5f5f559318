"""What a worker's metrics see of ticks and finished jobs."""

from __future__ import annotations

from darkroom import metrics
from darkroom.engine.engine import Event, Failed, Finished, TickReport


def observe_tick(report: TickReport) -> None:
    """Count one tick. Runs on the engine's thread: increments only."""
    metrics.TICKS.inc()
    metrics.TICK_SECONDS.observe(report.seconds)
    metrics.TICK_ROWS.observe(report.choice.model_rows)
    metrics.PADDED_ROWS.inc(report.choice.bucket - report.choice.model_rows)
    metrics.ROW_STEPS.inc(report.num_rows)


def observe_end(event: Event, outcome: str) -> None:
    """Count a job's end and where its time went."""
    metrics.JOBS_FINISHED.labels(outcome).inc()
    if isinstance(event, Failed):
        metrics.JOBS_FAILED.labels(event.failure.code).inc()
    if isinstance(event, Finished):
        timings = event.result.timings
        metrics.IMAGES.inc(len(event.images))
        metrics.QUEUE_WAIT_SECONDS.observe((event.job.claimed_at_ms - event.job.created_at_ms) / 1000)
        metrics.ENCODE_SECONDS.observe(timings.encode_s)
        metrics.DENOISE_SECONDS.observe(timings.denoise_s)
        metrics.DECODE_SECONDS.observe(timings.decode_s)
        metrics.IMAGE_ENCODE_SECONDS.observe(timings.image_encode_s)
