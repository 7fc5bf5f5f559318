"""What an API process's metrics and logs see of calls and of the queue."""

from __future__ import annotations

import math
import re
import secrets
import time

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from darkroom import metrics, tracing
from darkroom.api.problems import problem_of, respond
from darkroom.queue import MemorySample, QueueStats

log = structlog.get_logger("darkroom.api")

# For replies that say nothing else: run and show nothing of it, keep no copy, tell nobody where one came from.
_BROWSER_DEFAULTS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")

_WHOLE = (
    metrics.QUEUE_TENANTS,
    metrics.QUEUE_LARGEST_TENANT,
    metrics.QUEUE_IN_FLIGHT,
    metrics.QUEUE_OLDEST_WAIT_SECONDS,
    metrics.QUEUE_RESERVED_BYTES,
    metrics.QUEUE_DEAD_LETTERS,
    metrics.LIVE_WORKERS,
)


class Observe:
    """Time and count every call, and turn what nobody expected into a 500 that says nothing of the inside.

    Each reply has an `X-Request-Id`, the client's own if it sent one that can be taken, and so have all log lines. Each
    also tells browsers to do nothing with it but what its route has said.
    """

    def __init__(self, app: ASGIApp, *, is_for_other_sites: bool) -> None:
        self._app = app
        policy = "cross-origin" if is_for_other_sites else "same-origin"
        self._defaults = {**_BROWSER_DEFAULTS, "Cross-Origin-Resource-Policy": policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0
        request_id = _request_id(scope)
        metrics.HTTP_REQUESTS_IN_FLIGHT.inc()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in self._defaults.items():
                    headers.setdefault(name, value)
            await send(message)

        trace = tracing.mark_request(request_id, has_query=bool(scope["query_string"]))
        with structlog.contextvars.bound_contextvars(request_id=request_id, **trace):
            try:
                await self._app(scope, receive, observed)
            except Exception:
                log.exception("unexpected_error", method=scope["method"], route=_route(scope))
                metrics.REJECTS.labels("internal").inc()
                if status == 0:
                    detail = "the error was logged; trying again may help"
                    await respond(problem_of("internal", detail), scope["path"])(scope, receive, observed)
            finally:
                route = _route(scope)
                metrics.HTTP_REQUESTS_IN_FLIGHT.dec()
                metrics.HTTP_REQUESTS.labels(_method(scope), route, str(status)).inc()
                metrics.HTTP_REQUEST_SECONDS.labels(route).observe(time.perf_counter() - began)


def _request_id(scope: Scope) -> str:
    sent = dict(scope["headers"]).get(b"x-request-id", b"")
    return sent.decode() if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(16)


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "unmatched"))


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT") else "other"


def observe_queue(stats: QueueStats, memory: MemorySample) -> None:
    """Set the gauges of the whole queue."""
    metrics.QUEUE_REACHABLE.set(1)
    for model, depth in stats.depth.items():
        metrics.QUEUE_DEPTH.labels(model).set(depth)
    for model, backlog_s in stats.backlog_s.items():
        metrics.QUEUE_BACKLOG_SECONDS.labels(model).set(backlog_s)
    metrics.QUEUE_TENANTS.set(stats.num_tenants)
    metrics.QUEUE_LARGEST_TENANT.set(stats.largest_tenant)
    metrics.QUEUE_IN_FLIGHT.set(stats.in_flight)
    metrics.QUEUE_OLDEST_WAIT_SECONDS.set(stats.oldest_wait_s)
    metrics.QUEUE_RESERVED_BYTES.set(stats.reserved_bytes)
    metrics.QUEUE_DEAD_LETTERS.set(stats.dead_letters)
    metrics.LIVE_WORKERS.set(stats.live_workers)
    metrics.QUEUE_JOBS.set(stats.counters)
    metrics.REDIS_MEMORY_BYTES.labels("used").set(memory.used_bytes)
    if memory.maxmemory_bytes:
        metrics.REDIS_MEMORY_BYTES.labels("limit").set(memory.maxmemory_bytes)


def observe_outage() -> None:
    """Redis is away: what was last seen of the queue is no truth any more."""
    metrics.QUEUE_REACHABLE.set(0)
    for gauge in _WHOLE:
        gauge.set(math.nan)
    for gauge in (metrics.QUEUE_DEPTH, metrics.QUEUE_BACKLOG_SECONDS, metrics.REDIS_MEMORY_BYTES):
        gauge.clear()
    metrics.QUEUE_JOBS.set({})
