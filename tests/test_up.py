"""`darkroom up` as a whole: one command to a picture, restarts, and nothing left behind however it ends."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from darkroom.diffusion.images import read_parameters
from PIL import Image

from tests.support.tiny_models import write_tiny_model

MARK = "DARKROOM_TEST_MARK"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=9)
    card = {"id": "tiny", "num_inference_steps": 2, "width": 64, "height": 64, "example_prompts": ["the cat's hat"]}
    (directory / "darkroom.json").write_text(json.dumps(card))
    return directory


class Up:
    """A running `darkroom up`, its output, and all processes that descend from it."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.mark = secrets.token_hex(8)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "darkroom", "up", "--port", "0", "--data-dir", str(data_dir), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**clean, MARK: self.mark, "DARKROOM_NUM_THREADS": "1", "DARKROOM_LEASE_S": "2"},
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines))
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    lines.append(line.rstrip("\n"))
                    self._changed.notify_all()

    def wait_for(self, found: Callable[[], Any], timeout_s: float = 100.0) -> Any:
        """Wait until the output makes `found` true."""
        with self._changed:
            value = self._changed.wait_for(found, timeout_s)
        assert value, "\n".join(self.out + self.err)
        return value

    def events(self, name: str, **fields: object) -> list[dict[str, Any]]:
        """Log lines of that event whose fields have those values."""
        logged = [json.loads(line) for line in self.err if line.startswith("{")]
        return [line for line in logged if line["event"] == name and fields.items() <= line.items()]

    def wait_ready(self) -> str:
        """Wait for the block and return the page's address."""
        self.wait_for(lambda: any("Ctrl-C stops everything" in line for line in self.out))
        (address,) = (line.split()[1] for line in self.out if line.split()[:1] == ["page"])
        return str(address)

    def redis_pids(self) -> list[int]:
        """Every redis-server it ever started."""
        return [event["pid"] for event in self.events("embedded_redis")]

    def pids(self) -> dict[int, list[str]]:
        """Every living process that descends from this one, with its command line.

        They are known by a variable in their environment; redis-server writes its title over that.
        """
        found, redis = {}, self.redis_pids()
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                pid = int(entry.name)
                if pid in redis or f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if command != [""]:  # a zombie has none
                        found[pid] = command
        return found

    def pid_of(self, word: str) -> int:
        """The one child whose command line has this word."""
        (pid,) = (pid for pid, command in self.pids().items() if word in command)
        return pid

    def wait_gone(self, timeout_s: float) -> None:
        """No process may be left once this time has passed."""
        until = time.monotonic() + timeout_s
        while left := self.pids():
            assert time.monotonic() < until, f"left behind: {left}"
            time.sleep(0.02)

    def end(self, *numbers: signal.Signals, timeout_s: float = 30.0) -> int:
        """Send signals to the foreground group, as a terminal does, and wait for the end of everything."""
        for number in numbers:
            os.killpg(self.process.pid, number)
        code = self.process.wait(timeout_s)
        self.wait_gone(10.0)
        for reader in self._readers:
            reader.join(10)
        return code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start_up(*arguments: str) -> Up:
        started.append(Up(tmp_path / "data", *arguments))
        return started[-1]

    yield start_up
    for up in started:
        up.process.kill()
        up.process.wait()
        up.wait_gone(10.0)


def wait_ready_again(url: str) -> None:
    """Wait until the API answers that it is ready."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if httpx.get(f"{url}health/ready", timeout=20).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    pytest.fail("it did not become ready again")


def picture(url: str, seed: int) -> bytes:
    reply = httpx.post(
        f"{url}generate", json={"prompt": "a cat", "seed": seed}, headers={"accept": "image/png"}, timeout=40
    )
    assert reply.status_code == 200, reply.text
    return reply.content


@pytest.mark.timeout(300)
def test_one_command_to_a_picture_and_back_to_nothing(start: Callable[..., Up], model: Path, tmp_path: Path) -> None:
    up = start("--model", str(model))
    url = up.wait_ready()

    # What it prints can be copied and works as it stands.
    (line,) = (line for line in up.out if line.startswith("curl "))
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=40)
    record = read_parameters((tmp_path / "picture.png").read_bytes())
    assert record is not None
    assert record["request"]["prompt"] == "the cat's hat"
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (64, 64)
    assert httpx.get(url, timeout=20).status_code == 200
    addresses = [address for line in up.out for address in re.findall(r"http://\S+/metrics", line)]
    assert len(addresses) == 2
    assert all("darkroom_build_info" in httpx.get(address, timeout=20).text for address in addresses)

    # A killed process comes back, and what was asked for before is still there or still on its way.
    first = picture(url, seed=5)
    body = {"prompt": "a cat", "num_inference_steps": 200, "mode": "async"}
    jobs = [httpx.post(f"{url}generate", json={**body, "seed": seed}, timeout=20).json() for seed in range(3)]
    while httpx.get(f"{url}{jobs[0]['url'].lstrip('/')}", timeout=20).json()["state"] == "queued":
        time.sleep(0.02)
    for word in ("api", "worker"):
        os.kill(up.pid_of(word), signal.SIGKILL)
    up.wait_for(lambda: up.events("service_ended", service="api", reason="signal SIGKILL"))
    up.wait_for(lambda: up.events("service_ended", service="worker-0", reason="signal SIGKILL", restart_in_s=1.0))
    up.wait_for(lambda: len(up.events("worker_ready")) == 2)
    wait_ready_again(url)
    os.kill(up.redis_pids()[-1], signal.SIGKILL)
    up.wait_for(lambda: up.events("service_ended", service="redis"))
    up.wait_for(lambda: len(up.events("embedded_redis")) == 2)
    wait_ready_again(url)
    assert picture(url, seed=5) == first
    assert [final_state(f"{url}{job['url'].lstrip('/')}") for job in jobs] == ["succeeded"] * 3

    # A second one on the same directory is refused in one line.
    other = start()
    other.process.wait(60)
    assert other.end() == 2
    (refusal,) = (line for line in other.err if not line.startswith("{"))
    assert f"in use by another Darkroom (process {up.process.pid})" in refusal

    assert up.end(signal.SIGINT) == 0
    assert not [line for line in up.err if "cat" in line], "a prompt was logged"
    stopped = [event["event"] for event in map(json.loads, up.err) if event["event"].endswith("_stopped")]
    assert stopped == ["api_stopped", "worker_stopped", "all_stopped"]


def final_state(job_url: str) -> str:
    until = time.monotonic() + 100
    while (state := str(httpx.get(job_url, timeout=20).json()["state"])) in ("queued", "running"):
        assert time.monotonic() < until, f"{job_url} is still {state}"
        time.sleep(0.1)
    return state


@pytest.mark.timeout(300)
def test_a_kill_takes_everything_along_and_the_next_start_takes_over(start: Callable[..., Up], model: Path) -> None:
    up = start("--model", str(model))
    url = up.wait_ready()
    job = httpx.post(f"{url}generate", json={"prompt": "a cat", "mode": "async"}, timeout=20).json()
    up.process.kill()
    up.wait_gone(20.0)

    again = start("--model", str(model))
    url = again.wait_ready()
    until = time.monotonic() + 40
    while (state := httpx.get(f"{url}jobs/{job['job_id']}", timeout=20).json()["state"]) != "succeeded":
        assert state in ("queued", "running")
        assert time.monotonic() < until, f"still {state}"
        time.sleep(0.1)
    # Twice in a row, and mixed: the second only hurries it.
    assert again.end(signal.SIGINT, signal.SIGTERM) == 0


@pytest.mark.timeout(300)
def test_the_next_start_with_another_model_knows_nothing_of_the_workers_that_were_killed(
    start: Callable[..., Up], model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    card = json.loads((other / "darkroom.json").read_text())
    (other / "darkroom.json").write_text(json.dumps({**card, "id": "other"}))
    up = start("--model", str(model))
    up.wait_ready()
    up.process.kill()
    up.wait_gone(20.0)

    again = start("--model", str(other))
    url = again.wait_ready()
    (line,) = (line for line in again.out if line.startswith("curl "))
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=40)
    record = read_parameters((tmp_path / "picture.png").read_bytes())
    assert record is not None
    assert record["request"]["model"] == "other"
    assert [card["id"] for card in httpx.get(f"{url}models", timeout=20).json()["models"]] == ["other"]
    assert again.end(signal.SIGINT) == 0


@pytest.mark.parametrize("moment", ["embedded_redis", "api_listening"])
def test_ctrl_c_during_the_start_leaves_nothing(start: Callable[..., Up], model: Path, moment: str) -> None:
    up = start("--model", str(model))
    up.wait_for(lambda: up.events(moment))
    assert up.end(signal.SIGINT) == 0
    assert not [line for line in up.err if "Traceback" in line]


def test_a_model_that_cannot_be_served_ends_the_start_with_its_reason(start: Callable[..., Up], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    up = start("--model", str(empty))
    up.process.wait(100)
    assert up.end() == 2
    (line,) = (line for line in up.err if not line.startswith("{"))
    assert line.startswith("darkroom: ")
    assert str(empty) in line


@pytest.mark.timeout(300)
def test_generate_draws_in_its_own_process(model: Path, tmp_path: Path) -> None:
    def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "darkroom", "generate", "a cat", "--model", str(model), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)

    done = generate("-o", "cat.webp", "--seed", "3", "--steps", "3", "--sampler", "heun")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"cat\.webp  seed 3\nheun, 3 steps, [\d.]+ s \(encode", done.stdout)
    data = (tmp_path / "cat.webp").read_bytes()
    assert Image.open(io.BytesIO(data)).format == "WEBP"
    record = read_parameters(data)
    assert record is not None
    assert record["request"]["num_inference_steps"] == 3

    refused = generate("--steps", "0")
    assert refused.returncode == 2
    assert refused.stderr.startswith("darkroom: num_inference_steps: got 0")
