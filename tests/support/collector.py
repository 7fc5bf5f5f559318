"""An OpenTelemetry collector for tests: takes OTLP over HTTP and keeps the spans."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Proto
from opentelemetry.proto.trace.v1.trace_pb2 import Status

KINDS = {
    Proto.SPAN_KIND_INTERNAL: "internal",
    Proto.SPAN_KIND_SERVER: "server",
    Proto.SPAN_KIND_PRODUCER: "producer",
    Proto.SPAN_KIND_CONSUMER: "consumer",
}


@dataclass(frozen=True)
class Span:
    """One span as it arrived. Ids are lower-case hexadecimal, `links` are (trace id, span id), times in ns."""

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    links: list[tuple[str, str]]
    began_ns: int
    ended_ns: int
    is_error: bool

    @property
    def key(self) -> tuple[str, str]:
        return self.trace_id, self.span_id


class Collector:
    """Listens on a free port. While `answers` is not set, calls are taken and left without an answer."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.spans: list[Span] = []
        self.answers = threading.Event()
        self.answers.set()
        self._changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.answers.wait()
                collector._take(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        spans = [
            _span(attributes_of(resource.resource), span)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._changed:
            self.bodies.append(body)
            self.spans += spans
            self._changed.notify_all()

    def wait_for(self, found: Callable[[list[Span]], Any], timeout_s: float = 20.0) -> Any:
        """Wait until the spans make `found` true, and return what it says of them."""
        with self._changed:
            value = self._changed.wait_for(lambda: found(self.spans), timeout_s)
        assert value, [span.name for span in self.spans]
        return value

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Span:
        """The only span of that name."""
        (span,) = self.named(name)
        return span

    def close(self) -> None:
        self.answers.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def attributes_of(owner: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in owner.attributes}


def _span(resource: dict[str, Any], span: Proto) -> Span:
    return Span(
        service=resource["service.name"],
        name=span.name,
        kind=KINDS[span.kind],
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=attributes_of(span),
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        began_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        is_error=span.status.code == Status.STATUS_CODE_ERROR,
    )
