"""Run the API: uvicorn in one process, the metrics on their own port, and a drain that leaves no caller in the dark."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import structlog
import uvicorn

from darkroom import metrics, tracing
from darkroom.api.app import create_app
from darkroom.api.service import Service
from darkroom.config import Settings
from darkroom.errors import ConfigError
from darkroom.garbage import spare_what_is_there
from darkroom.queue import JobQueue

log = structlog.get_logger("darkroom.api")

# On SIGTERM a waiting call has this long to be answered with its pictures; then it is answered with its job's URL.
_HAND_OVER_AFTER_S = 0.6
# Written replies may still be on their way to slow readers; they are cut off after this.
_CLOSE_AFTER_S = 1
# All of this, and the last spans, fit into what `darkroom up` grants.
_STOP_AFTER_S = 1.65
_LAST_SPANS_S = 0.4


def serve(settings: Settings, url: str, *, on_listening: Callable[[str], None] | None = None) -> None:
    """Serve the API on `settings.host:port` with the queue at `url` until SIGTERM or SIGINT.

    `on_listening` is called with the base URL, the real port in it, once calls are answered. Raises `ConfigError` when
    an address cannot be bound, or would let strangers in.
    """
    settings.refuse_open_door()
    settings = settings.model_copy(update={"redis_url": url})
    tracing.configure(settings, "darkroom-api")
    JobQueue(settings, url)  # an unusable URL or result store stops the start here; an absent server does not
    listener = bind(settings.host, settings.port)
    metrics.export_only("api")
    metrics_port = metrics.serve_metrics(settings.metrics_host, settings.metrics_port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    base_url = f"http://{host}:{listener.getsockname()[1]}"
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_CLOSE_AFTER_S,
        # A pipelined call would inherit the log fields and the span of the one before it.
        reset_contextvars=True,
    )

    def announce() -> None:
        spare_what_is_there()
        log.info("api_listening", url=base_url, metrics=f"http://{settings.metrics_host}:{metrics_port}/metrics")
        if on_listening is not None:
            on_listening(base_url)

    with contextlib.closing(listener):
        server = DrainingServer(config, app.state.service, announce)
        asyncio.run(server.serve(sockets=[listener]))
    log.info("api_stopped")
    tracing.shutdown(min(_LAST_SPANS_S, max(0.0, server.stopping_since_s + _STOP_AFTER_S - time.monotonic())))


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises `ConfigError` naming the address when it is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol left out asyncio would not know this for TCP and leave Nagle's algorithm on: 40 ms a reply.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


class DrainingServer(uvicorn.Server):
    """uvicorn, but the first signal starts a drain: new work is refused with 503 while waiting calls get their answer
    or their job's URL. The second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._announce = announce
        self._drain: asyncio.Task[None] | None = None
        self.stopping_since_s = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Unlike uvicorn's own, this does not raise the signal again at the end: a drained process exits with 0.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begin the drain; a second call skips what is left of it. Call it on the server's event loop."""
        if self._drain is not None:
            self._service.handing_over.set()
            self.should_exit = self.force_exit = True
            return
        self.stopping_since_s = time.monotonic()
        log.info("api_draining", waiting=self._service.num_waiting)
        self._service.is_draining = True
        self._drain = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        await self._service.all_answered(_HAND_OVER_AFTER_S)
        self._service.handing_over.set()
        self.should_exit = True
