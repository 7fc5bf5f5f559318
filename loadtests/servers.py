"""The servers under load, each started in processes of its own and stopped again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx

from benchmarks.service import free_port
from loadtests.stages import Target

ROOT = Path(__file__).parents[1]
START_S = 180.0
STOP_S = 20.0
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
_METRICS = re.compile(r"(http://\S+/metrics)\s+worker-\d+")


@contextlib.contextmanager
def running(
    name: str, command: Sequence[str], is_up: Callable[[str], bool], env: dict[str, str] | None = None
) -> Iterator[str]:
    """Start `command`, wait until `is_up` of what it has printed, and yield that.

    Raises `RuntimeError` with the end of its log when it does not come up.
    """
    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory) / "out", Path(directory) / "log"
        with out.open("w") as out_file, log.open("w") as log_file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdout=out_file,
                stderr=log_file,
                start_new_session=True,
            )
        try:
            begun = time.monotonic()
            while not is_up(out.read_text()):
                if process.poll() is not None or time.monotonic() - begun > START_S:
                    raise RuntimeError(f"{name} did not come up:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield out.read_text()
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            # A server whose workers outlive it would take part in the next one's figures.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stop_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that no server outlives it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    return False


@contextlib.contextmanager
def darkroom(**settings: object) -> Iterator[Target]:
    """`darkroom up` with the built-in model and a data directory of its own; `settings` become DARKROOM_* variables."""
    with tempfile.TemporaryDirectory() as data_dir:
        url = f"http://127.0.0.1:{(port := free_port())}"
        env = {f"DARKROOM_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-m", "darkroom", "up", "--port", str(port), "--data-dir", data_dir]
        env = {"DARKROOM_LOG_LEVEL": "warning", **env}
        with running("darkroom", command, lambda printed: "Ctrl-C" in printed, env) as printed:
            yield Target("darkroom", url, _METRICS.findall(printed))


@contextlib.contextmanager
def plain() -> Iterator[Target]:
    """FastAPI around a diffusers pipeline with a lock."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "benchmarks.peers.plain_server", "--port", str(port)]
    with running("plain server", command, lambda _: _answers(f"{url}/health")):
        yield Target("FastAPI + diffusers", url)


@contextlib.contextmanager
def litserve() -> Iterator[Target]:
    """LitServe with batches of equal requests, from the virtual environment that `make loadtest-peers` makes.

    Raises `RuntimeError` without one.
    """
    python = os.environ.get("LOADTEST_PEERS_PYTHON", str(PEERS_PYTHON))
    if not Path(python).exists():
        raise RuntimeError(f"{python} is not there: `make loadtest-peers` installs LitServe beside the rest")
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [python, "-m", "benchmarks.peers.litserve_server", "--port", str(port)]
    with running("LitServe", command, lambda _: _answers(f"{url}/health")):
        yield Target("LitServe", url)


SERVERS = {"darkroom": darkroom, "plain": plain, "litserve": litserve}
