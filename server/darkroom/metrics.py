"""Every metric Darkroom exports, declared once.

One registry per process; a process exports what its own rooms observe, and Prometheus adds processes up. Names carry
the prefix `darkroom_`, base units and plural suffixes. Labels come from small closed sets: never a job id, prompt or
size.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from darkroom import __version__
from darkroom.errors import ConfigError

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

# One HTTP call lasts from a health check's fraction of a millisecond to a waiting call's minutes.
_CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# A tick is one UNet call: a few milliseconds on a large GPU, seconds on a CPU.
_TICK_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2, 4, 8)
# Parts of a job: from a cached prompt to a long wait in a full queue.
_PART_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)


def _counter(name: str, documentation: str, *labels: str) -> Counter:
    return Counter(name, documentation, labels, namespace="darkroom", registry=REGISTRY)


def _gauge(name: str, documentation: str, *labels: str) -> Gauge:
    return Gauge(name, documentation, labels, namespace="darkroom", registry=REGISTRY)


def _histogram(name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    return Histogram(name, documentation, labels, namespace="darkroom", buckets=buckets, registry=REGISTRY)


BUILD_INFO = _gauge("build_info", "Always 1; the label is the release.", "version")
BUILD_INFO.labels(__version__).set(1)

# The API.
HTTP_REQUESTS = _counter("http_requests_total", "HTTP calls answered.", "method", "route", "status")
HTTP_REQUEST_SECONDS = _histogram(
    "http_request_duration_seconds", "From the call's head to the reply's last byte.", _CALL_SECONDS, "route"
)
JOBS_ACCEPTED = _counter("jobs_accepted_total", "New jobs put into the queue by this process.", "priority")
JOBS_ANSWERED = _counter(
    "jobs_answered_total",
    "How waiting calls ended: the job's final state, handed_over (202 with its URL) or abandoned (the client left).",
    "outcome",
)
REJECTS = _counter("rejects_total", "Calls refused or failed, by error code.", "reason")
QUEUE_REACHABLE = _gauge("queue_reachable", "1 while Redis answers this process, else 0.")
QUEUE_DEPTH = _gauge("queue_depth", "Jobs waiting for a worker, in the whole queue.")
QUEUE_IN_FLIGHT = _gauge("queue_in_flight", "Jobs held by workers, in the whole queue.")
LIVE_WORKERS = _gauge("live_workers", "Workers whose heartbeat is alive.")

# The worker and its engine.
JOBS_FINISHED = _counter("jobs_finished_total", "Jobs this worker brought to an end.", "outcome")
JOBS_FAILED = _counter("jobs_failed_total", "Jobs this worker failed, by error code.", "code")
LEASES_LOST = _counter("leases_lost_total", "Jobs this worker gave up because another owns them now.")
IMAGES = _counter("images_total", "Images finished by this worker.")
TICKS = _counter("ticks_total", "UNet calls.")
ROW_STEPS = _counter("row_steps_total", "Denoising updates, one per image and UNet evaluation.")
PADDED_ROWS = _counter("padded_rows_total", "Model rows computed only to fill a fixed batch shape.")
TICK_ROWS = _histogram("tick_rows", "Model rows in one UNet call, padding left out.", _ROWS)
TICK_SECONDS = _histogram("tick_seconds", "One tick: gather, UNet, guidance, sampler update.", _TICK_SECONDS)
QUEUE_WAIT_SECONDS = _histogram("queue_wait_seconds", "From a job's acceptance to its claim.", _PART_SECONDS)
ENCODE_SECONDS = _histogram("encode_seconds", "Text encoding of one job.", _PART_SECONDS)
DENOISE_SECONDS = _histogram("denoise_seconds", "From a job's first tick to its last.", _PART_SECONDS)
DECODE_SECONDS = _histogram("decode_seconds", "VAE decode of one job.", _PART_SECONDS)
IMAGE_ENCODE_SECONDS = _histogram("image_encode_seconds", "Compression of one job's images.", _PART_SECONDS)


def serve_metrics(host: str, port: int) -> int:
    """Serve this process's metrics over HTTP from a daemon thread; returns the port in use (`port` 0 picks one).

    Raises `ConfigError` when the address cannot be bound.
    """
    try:
        server, _ = start_http_server(port, addr=host, registry=REGISTRY)
    except OSError as error:
        raise ConfigError(f"metrics: cannot listen on {host}:{port}: {error.strerror}") from error
    return int(server.server_port)
