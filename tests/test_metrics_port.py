"""The port beside the API's: metrics, and what a supervisor asks a worker."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from darkroom import metrics
from darkroom.config import Settings
from darkroom.errors import ConfigError
from darkroom.up import free_port


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


@pytest.fixture
def worker(settings: Settings, redis_url: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A worker process of the built-in model, just started, and its metrics port."""
    port = free_port("127.0.0.1", 0, setting="metrics")
    variables = {
        "DARKROOM_REDIS_URL": redis_url,
        "DARKROOM_SHARD": settings.shard,
        "DARKROOM_METRICS_PORT": str(port),
        "DARKROOM_DEVICE": "cpu",
        "DARKROOM_LOG_LEVEL": "error",
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}
    process = subprocess.Popen([sys.executable, "-m", "darkroom", "worker"], env={**clean, **variables})
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def test_a_worker_is_ready_once_warm_and_never_again_after_its_stop(
    worker: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, port = worker
    answers = [get(port, "/health/ready")]
    while answers[-1] != 200:
        assert process.poll() is None
        time.sleep(0.05)
        answers.append(get(port, "/health/ready"))
    assert answers[0] is None or answers[0] == 503
    assert get(port, "/health/live") == 200
    process.send_signal(signal.SIGTERM)
    after = []
    while process.poll() is None:
        after.append(get(port, "/health/ready"))
    assert process.wait() == 0
    stopped = next(index for index, answer in enumerate([*after, None]) if answer != 200)
    assert 200 not in after[stopped:]
