"""The port beside the API's: metrics, and what a supervisor asks a worker."""

from __future__ import annotations

import http.client
import socket
import threading

import httpx
import pytest
from darkroom import metrics
from darkroom.errors import ConfigError


def get(port: int, path: str) -> int | None:
    """The status of a reply, None when nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def test_ready_follows_what_it_is_told() -> None:
    ready = threading.Event()
    port = metrics.serve_metrics("127.0.0.1", 0, ready.is_set)
    assert (get(port, "/health/live"), get(port, "/health/ready")) == (200, 503)
    ready.set()
    assert (get(port, "/health/live"), get(port, "/health/ready")) == (200, 200)
    assert get(port, "/metrics") == 200


def test_a_process_that_knows_no_readiness_answers_none() -> None:
    port = metrics.serve_metrics("127.0.0.1", 0)
    assert (get(port, "/health/live"), get(port, "/health/ready"), get(port, "/metric")) == (200, 404, 404)


def test_it_listens_on_ipv6_too() -> None:
    try:
        port = metrics.serve_metrics("::1", 0)
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    assert httpx.get(f"http://[::1]:{port}/metrics", trust_env=False).status_code == 200


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            metrics.serve_metrics("127.0.0.1", port)
