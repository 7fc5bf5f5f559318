"""Every metric Darkroom exports, declared once.

One registry per process; a process exports what its own rooms observe (`export_only`), and Prometheus adds processes
up. Names carry the prefix `darkroom_`, base units and plural suffixes. Labels come from small closed sets: never a job
id, prompt or size.
"""

from __future__ import annotations

import platform
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    make_wsgi_app,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from darkroom import __version__
from darkroom.errors import HTTP_STATUS, ConfigError

_Metric = TypeVar("_Metric", bound=MetricWrapperBase)

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

# One HTTP call lasts from a health check's fraction of a millisecond to a waiting call's minutes.
_CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# A tick is one UNet call: a few milliseconds on a large GPU, seconds on a CPU.
_TICK_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2, 4, 8)
# Parts of a job: from a cached prompt to a long wait in a full queue.
_PART_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)


class _Declare:
    """Declares metrics, and keeps in mind which kind of process has values of them."""

    def __init__(self) -> None:
        self.metrics: list[Collector] = []

    def counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return self._kept(Counter(name, documentation, labels, namespace="darkroom", registry=REGISTRY))

    def gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return self._kept(Gauge(name, documentation, labels, namespace="darkroom", registry=REGISTRY))

    def histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        metric = Histogram(name, documentation, labels, namespace="darkroom", buckets=buckets, registry=REGISTRY)
        return self._kept(metric)

    def _kept(self, metric: _Metric) -> _Metric:
        self.metrics.append(metric)
        return metric


_any, _api, _worker = _Declare(), _Declare(), _Declare()

BUILD_INFO = _any.gauge("build_info", "Always 1; the labels say what runs.", "version", "python")
BUILD_INFO.labels(__version__, platform.python_version()).set(1)

# The API.
HTTP_REQUESTS = _api.counter("http_requests_total", "HTTP calls answered.", "method", "route", "status")
HTTP_REQUESTS_IN_FLIGHT = _api.gauge("http_requests_in_flight", "HTTP calls that are being answered.")
HTTP_REQUEST_SECONDS = _api.histogram(
    "http_request_duration_seconds", "From the call's head to the reply's last byte.", _CALL_SECONDS, "route"
)
JOBS_ACCEPTED = _api.counter("jobs_accepted_total", "New jobs put into the queue by this process.", "priority")
JOBS_ANSWERED = _api.counter(
    "jobs_answered_total",
    "How waiting calls ended: the job's final state, handed_over (202 with its URL) or abandoned (the client left).",
    "outcome",
)
REJECTS = _api.counter("rejects_total", "Calls refused or failed, by error code.", "reason")

# The whole queue, as each API process sees it once a second: take the max over processes, never the sum. While Redis
# is away only queue_reachable has a value.
QUEUE_REACHABLE = _api.gauge("queue_reachable", "1 while Redis answers this process, else 0.")
QUEUE_DEPTH = _api.gauge("queue_depth", "Jobs waiting for a worker.", "model")
QUEUE_BACKLOG_SECONDS = _api.gauge(
    "queue_backlog_seconds",
    "Work that waits, over the measured rate of the live workers (of one, while none lives). No value before any "
    "worker has measured its rate.",
    "model",
)
QUEUE_TENANTS = _api.gauge("queue_tenants", "Tenants with waiting jobs; without API keys there is one.")
QUEUE_LARGEST_TENANT = _api.gauge("queue_largest_tenant_jobs", "Waiting jobs of the tenant that has most of them.")
QUEUE_IN_FLIGHT = _api.gauge("queue_in_flight", "Jobs held by workers.")
QUEUE_OLDEST_WAIT_SECONDS = _api.gauge("queue_oldest_wait_seconds", "Age of the oldest waiting job; 0 when none waits.")
QUEUE_RESERVED_BYTES = _api.gauge("queue_reserved_bytes", "Memory kept free in Redis for results of accepted jobs.")
QUEUE_DEAD_LETTERS = _api.gauge("queue_dead_letters", "Jobs on the dead-letter stream.")
LIVE_WORKERS = _api.gauge("live_workers", "Workers whose heartbeat is alive.")
REDIS_MEMORY_BYTES = _api.gauge("redis_memory_bytes", "Memory of the Redis server: used, and its limit if any.", "kind")

# Of the Redis that a process is connected to: API and workers.
REDIS_DURABILITY = _any.gauge(
    "redis_durability",
    "1 for what a crash of its machine leaves of the jobs that Redis has answered for: fsync (all), relaxed (all but "
    "the last second), rarely (those of the last half minute or snapshot), nothing, or unknown.",
    "state",
)
REDIS_REFUSALS = _any.counter(
    "redis_refusals_total",
    "Commands that Redis answered with an error: memory (full), read_only (a replica), disk (cannot write), loading "
    "(starting), replicas (too few), other.",
    "reason",
)
NOT_REPLICATED = _any.counter(
    "not_replicated_total",
    "Jobs and results that too few replicas had in time, where durability is replicated.",
    "kind",
)

# Whoever looks after lost leases: API and workers.
REDELIVERIES = _any.counter("redeliveries_total", "Jobs taken back from a lost worker and put into the queue again.")
JOBS_ABANDONED = _any.counter(
    "jobs_abandoned_total",
    "Jobs cancelled because their clients had left and did not come back in time.",
)
DEAD_LETTERS = _any.counter("dead_letters_total", "Jobs given up because too many workers were lost while they ran.")

# The worker and its engine.
WORKER_STATE = _worker.gauge("worker_state", "1 for the state the worker is in: starting, ready or draining.", "state")
MODEL_LOAD_SECONDS = _worker.gauge("model_load_seconds", "Time to load a model's weights.", "model")
WARM_UP_SECONDS = _worker.gauge("warm_up_seconds", "Time to check kernels, capture graphs and draw a first picture.")
JOBS_CLAIMED = _worker.counter("jobs_claimed_total", "Jobs this worker took: for the first time, or again.", "delivery")
JOBS_FINISHED = _worker.counter("jobs_finished_total", "Jobs this worker brought to an end.", "outcome")
JOBS_FAILED = _worker.counter("jobs_failed_total", "Jobs this worker failed, by error code.", "code")
JOB_SECONDS = _worker.histogram(
    "job_duration_seconds", "From a job's acceptance to its end by this worker.", _PART_SECONDS, "outcome"
)
LEASES_LOST = _worker.counter("leases_lost_total", "Jobs this worker gave up because another owns them now.")
IMAGES = _worker.counter("images_total", "Images finished by this worker.")
PIXELS = _worker.counter("pixels_total", "Pixels of those images.")
MAX_MODEL_ROWS = _worker.gauge("max_model_rows", "Most model rows that one tick of this worker holds.")
RESIDENT_ROWS = _worker.gauge("resident_rows", "Model rows this worker holds or is about to hold.")
TICKS = _worker.counter("ticks_total", "UNet calls.")
ROW_STEPS = _worker.counter("row_steps_total", "Denoising updates, one per image and UNet evaluation.")
PADDED_ROWS = _worker.counter("padded_rows_total", "Model rows computed only to fill a fixed batch shape.")
TICK_ROWS = _worker.histogram("tick_rows", "Model rows in one UNet call, padding left out.", _ROWS)
TICK_PADDED_ROWS = _worker.histogram("tick_padded_rows", "Model rows of padding in one UNet call.", (0, *_ROWS))
TICK_SECONDS = _worker.histogram(
    "tick_seconds", "One tick, by its row bucket: gather, UNet, guidance, sampler update.", _TICK_SECONDS, "bucket"
)
ROWS_JOINED = _worker.counter("rows_joined_total", "Images that joined the running batch between two ticks.")
ROWS_LEFT = _worker.counter(
    "rows_left_total", "Images that left it: finished, or early because their job ended (cancelled, failed).", "reason"
)
ROWS_NOT_TAKEN = _worker.counter(
    "rows_not_taken_total",
    "Images that a tick left waiting: other_shape (another size or model had its turn), no_room (the tick was full), "
    "no_slot (no place for their latents yet), kept_apart (a worker was lost with them, or with the others).",
    "reason",
)
CHECKPOINTS = _worker.counter("checkpoints_total", "Times that the state of a running image was copied out.")
PREVIEWS = _worker.counter("previews_total", "Previews made of running images that somebody watched.", "kind")
RESUMES = _worker.counter(
    "resumes_total", "Images that went on from where another worker, or an earlier life, had left them."
)
STEPS_SAVED = _worker.counter(
    "steps_saved_total", "UNet evaluations of images that need not be done again because of that."
)
PROMPT_CACHE = _worker.counter(
    "prompt_cache_requests_total", "Prompts looked up in the cache of embeddings.", "outcome"
)
OUT_OF_MEMORY = _worker.counter("out_of_memory_total", "Ticks, decodes and encodes that found no memory.", "where")
NON_FINITE = _worker.counter(
    "non_finite_total", "Times that an image came out, or went in, as NaN or infinity.", "where"
)
NON_FINITE_RECOVERED = _worker.counter(
    "non_finite_recovered_total", "Images that came out as NaN or infinity, and in fp32 or once more did not.", "where"
)
VAE_UPCASTS = _worker.counter("vae_upcasts_total", "Autoencoders replaced by their fp32 form because they overflowed.")
QUEUE_WAIT_SECONDS = _worker.histogram("queue_wait_seconds", "From a job's acceptance to its claim.", _PART_SECONDS)
ENCODE_SECONDS = _worker.histogram("encode_seconds", "Encoding of one job's texts and init image.", _PART_SECONDS)
DENOISE_SECONDS = _worker.histogram("denoise_seconds", "From a job's first tick to its last.", _PART_SECONDS)
DECODE_SECONDS = _worker.histogram("decode_seconds", "VAE decode of one job.", _PART_SECONDS)
IMAGE_ENCODE_SECONDS = _worker.histogram("image_encode_seconds", "Compression of one job's images.", _PART_SECONDS)
RESULT_STORE_SECONDS = _any.histogram(
    "result_store_seconds", "One call to the result store.", _PART_SECONDS, "operation"
)
RESULT_STORE_ERRORS = _any.counter("result_store_errors_total", "Calls to the result store that failed.", "operation")
GPU_MEMORY_BYTES = _worker.gauge(
    "gpu_memory_bytes",
    "Memory of the worker's GPU: total and used, by whomever; of the used, what torch keeps (reserved) and what holds "
    "tensors (allocated).",
    "gpu",
    "kind",
)
GPU_UTILIZATION = _worker.gauge("gpu_utilization_ratio", "Share of time in which a kernel ran on the GPU.", "gpu")
GPU_POWER_WATTS = _worker.gauge("gpu_power_watts", "Power that the GPU draws.", "gpu")
GPU_TEMPERATURE_CELSIUS = _worker.gauge("gpu_temperature_celsius", "Temperature of the GPU.", "gpu")
GPU_XID_ERRORS = _worker.counter(
    "gpu_xid_errors_total", "Critical errors that the driver reported of the GPU, by their Xid number.", "gpu", "xid"
)

# A series of a closed set is there from the start: Prometheus sees the first event as a change only then.
_ENDS = ("succeeded", "failed", "cancelled", "expired")
for _metric, _values in (
    (JOBS_ACCEPTED, ("low", "normal", "high")),
    (JOBS_ANSWERED, (*_ENDS, "handed_over", "abandoned")),
    (REJECTS, tuple(HTTP_STATUS)),
    (JOBS_CLAIMED, ("first", "again")),
    (JOBS_FINISHED, _ENDS),
    (JOB_SECONDS, _ENDS),
    (JOBS_FAILED, ("job_failed", "bad_message", "non_finite", "out_of_memory", "storage_unavailable")),
    (ROWS_LEFT, ("finished", "ended_early")),
    (ROWS_NOT_TAKEN, ("other_shape", "no_room", "no_slot", "kept_apart")),
    (PROMPT_CACHE, ("hit", "miss")),
    (OUT_OF_MEMORY, ("tick", "decode", "encode")),
    (NON_FINITE, ("tick", "decode", "encode")),
    (PREVIEWS, ("linear", "vae")),
    (REDIS_REFUSALS, ("memory", "read_only", "disk", "loading", "replicas", "other")),
    (NOT_REPLICATED, ("job", "result")),
    (NON_FINITE_RECOVERED, ("tick", "decode")),
    (RESULT_STORE_SECONDS, ("put", "get", "delete", "sign")),
    (RESULT_STORE_ERRORS, ("put", "get", "delete", "sign")),
):
    for _value in _values:
        _metric.labels(_value)


class _QueueJobs(Collector):
    """Jobs of the whole queue by what became of them, as Redis counts them."""

    def __init__(self) -> None:
        self._counts: Mapping[str, int] = {}

    def set(self, counts: Mapping[str, int]) -> None:
        """`counts` by state: accepted and the terminal ones. Empty while Redis is away."""
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "darkroom_queue_jobs",
            "Jobs of the whole queue: accepted, and by the state of their end.",
            labels=["state"],
        )
        for state, count in self._counts.items():
            family.add_metric([state], count)
        yield family


QUEUE_JOBS = _QueueJobs()
REGISTRY.register(QUEUE_JOBS)
_api.metrics.append(QUEUE_JOBS)


class Declared(NamedTuple):
    """What a metric was declared as."""

    name: str
    documentation: str
    labels: tuple[str, ...]


def declared() -> list[Declared]:
    """Every metric of Darkroom's own, whether or not this process has a value of it."""
    own = (metric for metric in globals().values() if isinstance(metric, MetricWrapperBase))
    declared = [Declared(metric._name, metric._documentation, metric._labelnames) for metric in own]
    return [*declared, Declared("darkroom_queue_jobs", "Jobs of the whole queue, by state.", ("state",))]


def export_only(kind: Literal["api", "worker"]) -> None:
    """Leave out, for good, what only the other kind of process observes: zeros would pass for an empty queue."""
    for metric in (_worker if kind == "api" else _api).metrics:
        REGISTRY.unregister(metric)


def exposition() -> tuple[bytes, str]:
    """This process's metrics as text, and its content type."""
    return generate_latest(REGISTRY), CONTENT_TYPE_LATEST


def serve_metrics(host: str, port: int, is_ready: Callable[[], bool] | None = None) -> int:
    """Serve this process's metrics over HTTP from a daemon thread; returns the port in use (`port` 0 picks one).

    `/health/live` answers 200 while the process does anything at all. With `is_ready`, which is called on another
    thread, `/health/ready` answers 200 or 503: a worker has no other port to be asked on. Raises `ConfigError` when
    the address cannot be bound.
    """

    class Server(ThreadingWSGIServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        server = make_server(host, port, _app(is_ready), Server, handler_class=_QuietHandler)
    except OSError as error:
        raise ConfigError(f"metrics: cannot listen on {host}:{port}: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_port)


class _QuietHandler(WSGIRequestHandler):
    """Scrapes and probes are not worth a line each."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def _app(is_ready: Callable[[], bool] | None) -> WSGIApplication:
    scrape: WSGIApplication = make_wsgi_app(REGISTRY)
    answers: dict[str, Callable[[], bool]] = {"/health/live": lambda: True}
    if is_ready is not None:
        answers["/health/ready"] = is_ready

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path in ("/", "/metrics"):
            return scrape(environ, start_response)
        status = "404 Not Found"
        if path in answers:
            status = "200 OK" if answers[path]() else "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{status}\n".encode()]

    return app
