"""Traces: one request followed from HTTP through the queue into the worker that draws it.

Off unless `DARKROOM_TRACING=on`, and then every function here returns at once. The SDK and its exporter come with the
extra `tracing`, are imported only where tracing is on, and take their own settings from the `OTEL_*` variables.

Whether a request is traced is decided where it comes in. A job carries the context of its request only if that is
sampled, so one without it costs a worker nothing. Spans carry ids, sizes and counts, never a prompt.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import msgspec
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from darkroom import __version__
from darkroom.config import Settings
from darkroom.errors import ConfigError, DarkroomError
from darkroom.jobs import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

_SEND_EVERY_MS = 1000
_MESSAGE_ID = "messaging.message.id"
_W3C = TraceContextTextMapPropagator()


@dataclass(frozen=True)
class _Tracing:
    """What a process that traces has. `ticks` records whatever it is asked to: its caller has looked at the jobs."""

    provider: TracerProvider
    tracer: trace.Tracer
    ticks: trace.Tracer
    processor: BatchSpanProcessor


_tracing: _Tracing | None = None


def check(settings: Settings) -> None:
    """Raise `ConfigError` when the settings ask for traces and the extra is not installed."""
    if settings.tracing == "on":
        try:
            found = find_spec("opentelemetry.exporter.otlp.proto.http")
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ConfigError("DARKROOM_TRACING=on needs OpenTelemetry's SDK: pip install 'darkroom[tracing]'")


def configure(settings: Settings, service: str) -> None:
    """Start tracing in this process if the settings say so, under the name `service` unless `OTEL_SERVICE_NAME` has
    another. Raises `ConfigError` as `check`."""
    global _tracing
    check(settings)
    if settings.tracing == "off":
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    named = {
        "service.name": service,
        "service.version": __version__,
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
    }
    resource = Resource.create(named).merge(OTELResourceDetector().detect())
    # Short, so that a process that ends has little left to send.
    delay_ms = None if "OTEL_BSP_SCHEDULE_DELAY" in os.environ else _SEND_EVERY_MS
    processor = BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=delay_ms)
    provider, of_ticks = (
        TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False) for sampler in (None, ALWAYS_ON)
    )
    provider.add_span_processor(processor)
    of_ticks.add_span_processor(processor)
    _tracing = _Tracing(provider, _tracer_of(provider), _tracer_of(of_ticks), processor)


def _tracer_of(provider: TracerProvider) -> trace.Tracer:
    return provider.get_tracer("darkroom", __version__)


def shutdown(timeout_s: float) -> None:
    """Stop tracing and send what is left, for `timeout_s` at most: a collector that is away holds nobody up."""
    global _tracing
    if _tracing is None:
        return
    # Its own limit is half a minute.
    sending = threading.Thread(target=_tracing.processor.shutdown, name="last-spans", daemon=True)
    _tracing = None
    sending.start()
    sending.join(timeout_s)


def provider() -> TracerProvider | None:
    """Where spans of this process go; None while tracing is off."""
    return None if _tracing is None else _tracing.provider


# In the API.


def mark_request(request_id: str, *, has_query: bool) -> dict[str, str]:
    """Complete the span of the HTTP call that is under way, and return what makes log lines findable with its trace:
    trace_id and span_id, or nothing unless it is sampled."""
    if _tracing is None:
        return {}
    span = trace.get_current_span()
    context = span.get_span_context()
    if not context.trace_flags.sampled:
        return {}
    span.set_attribute("darkroom.request_id", request_id)
    if has_query:
        # No call of ours takes one, so it may hold anything, a prompt included.
        span.set_attribute("url.query", "REDACTED")
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


@contextmanager
def enqueueing(job: Job) -> Iterator[Job]:
    """The span of handing `job` to the queue. Yields the job to store: with the span's context in it if sampled."""
    if _tracing is None:
        yield job
        return
    with _tracing.tracer.start_as_current_span(
        "enqueue",
        kind=SpanKind.PRODUCER,
        attributes={**_messaging(job, "enqueue", "send"), "darkroom.cost": job.cost},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        if span.get_span_context().trace_flags.sampled:
            carrier: dict[str, str] = {}
            _W3C.inject(carrier)
            job = msgspec.structs.replace(job, traceparent=carrier["traceparent"])
        try:
            yield job
        except DarkroomError as error:
            _fail(span, error.code)
            raise


def mark_enqueued(job_id: str) -> None:
    """Name the job that the current `enqueueing` has led to; an idempotency key may have led to an earlier one."""
    if _tracing is not None:
        trace.get_current_span().set_attribute(_MESSAGE_ID, job_id)


# In a worker.


def log_fields(job: Job) -> dict[str, str]:
    """What makes log lines about `job` findable with its trace: the trace_id, if its request was sampled."""
    return {"trace_id": job.traceparent[3:35]} if job.traceparent else {}


def follow(job: Job, claimed_s: float) -> JobTrace | None:
    """Begin the spans of a job that was claimed at `claimed_s` on the monotonic clock; None unless it is sampled."""
    if _tracing is None or not job.traceparent:
        return None
    parent = _W3C.extract({"traceparent": job.traceparent}, Context())
    if not trace.get_current_span(parent).get_span_context().is_valid:
        return None
    return JobTrace(_tracing.tracer, job, parent, claimed_s)


class JobTrace:
    """One attempt at a job in this worker: a span for its time here, and children for its phases.

    All times are seconds on the monotonic clock.
    """

    def __init__(self, tracer: trace.Tracer, job: Job, parent: Context, claimed_s: float) -> None:
        self._tracer = tracer
        # One reading for all spans of the job, so that they keep their order.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        waited_s = (job.claimed_at_ms - job.created_at_ms) / 1000
        self._add("queue.wait", claimed_s - waited_s, claimed_s, parent)
        request = job.request
        self._span = tracer.start_span(
            "job",
            parent,
            SpanKind.CONSUMER,
            {
                **_messaging(job, "process", "process"),
                _MESSAGE_ID: job.id,
                "darkroom.attempt": job.attempt,
                "darkroom.priority": job.priority.value,
                "darkroom.width": request.width,
                "darkroom.height": request.height,
                "darkroom.num_inference_steps": request.num_inference_steps,
                "darkroom.num_images": request.num_images_per_prompt,
                "darkroom.sampler": request.sampler,
                "darkroom.uses_guidance": request.uses_guidance,
            },
            start_time=self.wall_ns(claimed_s),
        )
        self._context = trace.set_span_in_context(self._span, Context())
        self._ticks: list[Link] = []

    @property
    def link(self) -> Link:
        """From a span that serves several jobs to this one."""
        return Link(self._span.get_span_context())

    def wall_ns(self, monotonic_s: float) -> int:
        return self._epoch_ns + int(monotonic_s * 1e9)

    def note_tick(self, tick: SpanContext) -> None:
        self._ticks.append(Link(tick))

    def add(self, phase: str, began_s: float, ended_s: float) -> None:
        """A child for a phase that is over. The one of all ticks has links to them."""
        self._add(phase, began_s, ended_s, self._context, self._ticks if phase == "denoise" else ())

    def _add(self, name: str, began_s: float, ended_s: float, parent: Context, links: Sequence[Link] = ()) -> None:
        span = self._tracer.start_span(name, parent, links=links, start_time=self.wall_ns(began_s))
        span.end(self.wall_ns(ended_s))

    def end(self, outcome: str, error_code: str | None = None) -> None:
        """The job has left this worker. Only the first end counts."""
        if not self._span.is_recording():
            return
        self._span.set_attribute("darkroom.outcome", outcome)
        if error_code is not None:
            _fail(self._span, error_code)
        self._span.end(self.wall_ns(time.monotonic()))


def add_tick(
    jobs: Sequence[JobTrace], began_s: float, ended_s: float, attributes: Mapping[str, AttributeValue]
) -> None:
    """The span of one tick that served `jobs`, at least one, with a link to each: a trace of its own, as it belongs to
    none of theirs alone."""
    if _tracing is None:
        return
    wall_ns = jobs[0].wall_ns
    span = _tracing.ticks.start_span(
        "tick", Context(), attributes=attributes, links=[job.link for job in jobs], start_time=wall_ns(began_s)
    )
    span.end(wall_ns(ended_s))
    for job in jobs:
        job.note_tick(span.get_span_context())


def _messaging(job: Job, name: str, type_: str) -> dict[str, AttributeValue]:
    """OpenTelemetry's names for a step of a queued message. The queue of each model is a destination."""
    return {
        "messaging.system": "redis",
        "messaging.destination.name": job.request.model,
        "messaging.operation.name": name,
        "messaging.operation.type": type_,
    }


def _fail(span: trace.Span, code: str) -> None:
    span.set_attribute("error.type", code)
    span.set_status(StatusCode.ERROR, code)
