"""The command line as its user sees it: real processes, their output and their exit codes."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from darkroom import __version__
from darkroom.config import Settings
from darkroom.errors import ConfigError, Unavailable
from darkroom.generate import generate_there, paths_of, read_events
from darkroom.jobs import Failure
from darkroom.queue import JobQueue
from darkroom.up import STOP_TIMEOUTS_S, first_request, free_port, gpus_to_use, plan_workers, visible_gpus
from PIL import Image

from tests.support.http import served
from tests.support.instant_worker import InstantWorker, card, colour


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without Darkroom's variables, plus the given ones."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}
    return {**clean, "COLUMNS": "120", **variables}


def darkroom(*arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run a command to its end: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "darkroom", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=env or environment(),
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


async def darkroom_beside(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """The same while this event loop goes on serving."""
    return await asyncio.to_thread(darkroom, *arguments, cwd=cwd)


def test_version() -> None:
    assert darkroom("--version") == (0, f"darkroom {__version__}\n", "")


def test_help_names_every_command() -> None:
    code, out, _ = darkroom("--help")
    assert code == 0
    for command in ("up", "api", "worker", "generate", "models", "bench"):
        assert f" {command} " in out


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["up"], {"DARKROOM_PORT": "many"}, "DARKROOM_PORT='many'"),
        (["up", "--model", "/nowhere"], {}, "/nowhere: no such directory"),
        (["up", "--data-dir", "/proc/1/nowhere"], {}, "DARKROOM_DATA_DIR"),
        (["worker"], {}, "DARKROOM_REDIS_URL is not set"),
        (["api"], {}, "DARKROOM_REDIS_URL is not set"),
        (["up"], {"DARKROOM_RESULT_STORE": "ftp://x"}, "DARKROOM_RESULT_STORE='ftp://x'"),
        (["up"], {"DARKROOM_RESULT_STORE": "file:///proc/x"}, "DARKROOM_RESULT_STORE=file:///proc/x"),
        (["up"], {"DARKROOM_RESULT_URLS": "signed"}, "only a bucket in DARKROOM_RESULT_STORE has signed URLs"),
        (["bench", "kernels", "--device", "cuda:99"], {}, "DARKROOM_DEVICE=cuda:99"),
        (["bench", "kernels", "--device", "cpu", "--tune"], {}, "tuned on a CUDA device"),
        (["generate", "a fox", "-o", "fox.gif"], {}, "expected a name that ends in .png"),
        (["generate", "a fox", "-o", "/nowhere/fox.png"], {}, "expected a file in a directory that exists"),
        (["generate", "a fox", "--init-image", "/nowhere/fox.png"], {}, "--init-image: got '/nowhere/fox.png'"),
        (["generate", "a fox", "--init-image", "/proc/version"], {}, "expected a still picture: PNG, JPEG or WebP"),
        (["generate", "a fox", "--strength", "0.5"], {}, "beside init_image"),
        (["generate", "a fox", "--url", "localhost:8000"], {}, "expected an address such as http://127.0.0.1:8000"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    arguments: list[str], variables: dict[str, str], says: str
) -> None:
    code, out, err = darkroom(*arguments, env=environment(**variables))
    assert code == 2
    assert out == ""
    (line,) = (line for line in err.splitlines() if not line.startswith("{"))
    assert line.startswith("darkroom: ")
    assert says in line


def test_a_taken_port_is_one_line_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = darkroom("up", "--port", str(port))
    assert code == 2
    assert err == f"darkroom: cannot listen on 127.0.0.1:{port}: Address already in use; --port chooses another\n"


def test_an_unreachable_server_is_one_line_and_exit_code_1() -> None:
    code, _, err = darkroom("generate", "a fox", "--url", "http://127.0.0.1:1")
    assert code == 1
    assert err.startswith("darkroom: http://127.0.0.1:1 does not answer")
    assert err.count("\n") == 1


async def test_generate_fetches_every_picture_from_a_server(
    settings: Settings, queue: JobQueue, tmp_path: Path
) -> None:
    async with served(settings, queue) as server, InstantWorker(queue).running():
        code, out, err = await darkroom_beside(
            "generate", "a fox", "-o", "fox.png", "-n", "2", "--seed", "40", "--sampler", "euler", "--steps", "3",
            "--url", f"http://127.0.0.1:{server.port}/", cwd=tmp_path,
        )  # fmt: skip
    assert (code, err) == (0, "")
    assert "fox-0.png  seed 40" in out
    assert "fox-1.png  seed 41" in out
    assert "euler, 3 steps" in out
    for index in range(2):
        with Image.open(tmp_path / f"fox-{index}.png") as image:
            assert image.getpixel((0, 0)) == colour(40 + index)


async def test_generate_sends_the_pictures_to_begin_with_and_how_to_read_the_prompt(
    settings: Settings, queue: JobQueue, tmp_path: Path
) -> None:
    for name, colour_of_it in (("cat.png", "red"), ("mask.png", "white")):
        Image.new("RGB", (32, 16), colour_of_it).save(tmp_path / name)
    async with served(settings, queue) as server, InstantWorker(queue).running() as worker:
        code, _, err = await darkroom_beside(
            "generate", "a (fox:1.2)", "-o", "fox.png", "--init-image", "cat.png", "--mask", "mask.png",
            "--strength", "0.6", "--prompt-syntax", "weighted", "--url", f"http://127.0.0.1:{server.port}/",
            cwd=tmp_path,
        )  # fmt: skip
        ((job_id, inputs),) = worker.inputs.items()
        manifest = (await server.client.get(f"/jobs/{job_id}")).json()["manifest"]
    assert (code, err) == (0, "")
    assert (manifest["prompt_syntax"], manifest["strength"]) == ("weighted", 0.6)
    assert set(inputs) == {"init_image", "mask_image"}
    with Image.open(tmp_path / "fox.png") as image:
        assert image.size == (32, 16)


async def test_the_file_name_says_the_format(settings: Settings, queue: JobQueue, tmp_path: Path) -> None:
    async with served(settings, queue) as server, InstantWorker(queue).running():
        url = f"http://127.0.0.1:{server.port}"
        await darkroom_beside("generate", "a fox", "-o", "fox.jpg", "--url", url, cwd=tmp_path)
        await darkroom_beside("generate", "a fox", "-o", "fox", "--format", "webp", "--url", url, cwd=tmp_path)
    for name, expected in (("fox.jpg", "JPEG"), ("fox", "WEBP")):
        with Image.open(io.BytesIO((tmp_path / name).read_bytes())) as image:
            assert image.format == expected


async def test_a_refused_request_is_the_servers_sentence_and_exit_code_2(
    settings: Settings, queue: JobQueue, tmp_path: Path
) -> None:
    async with served(settings, queue) as server, InstantWorker(queue).running():
        url = f"http://127.0.0.1:{server.port}"
        code, _, err = await darkroom_beside("generate", "a fox", "--steps", "0", "--url", url, cwd=tmp_path)
    assert code == 2
    assert err == "darkroom: num_inference_steps: got 0, expected an integer from 1 to 200\n"


async def test_a_failed_job_is_its_reason_and_exit_code_1(settings: Settings, queue: JobQueue, tmp_path: Path) -> None:
    worker = InstantWorker(queue)
    worker.failure = Failure(code="out_of_memory", message="the device ran out of memory")
    async with served(settings, queue) as server, worker.running():
        url = f"http://127.0.0.1:{server.port}"
        code, _, err = await darkroom_beside("generate", "a fox", "--url", url, cwd=tmp_path)
    assert (code, err) == (1, "darkroom: the device ran out of memory\n")
    assert os.listdir(tmp_path) == []


async def test_ctrl_c_cancels_the_job_on_the_server(settings: Settings, queue: JobQueue, tmp_path: Path) -> None:
    worker = InstantWorker(queue)
    worker.gate.clear()
    async with served(settings, queue) as server, worker.running():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "darkroom", "generate", "a fox", "--url", f"http://127.0.0.1:{server.port}",
            cwd=tmp_path, env=environment(),
        )  # fmt: skip
        await asyncio.wait_for(worker.started.wait(), 20)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 10) == 130
        until = time.monotonic() + 10
        while (await queue.stats()).counters["cancelled"] == 0:
            assert time.monotonic() < until, "the job was not cancelled"


JOB_URL = "/jobs/0"


class OddServer(ThreadingHTTPServer):
    """A server that accepts one job when `may_answer` is set, ends each event stream at once and drops a DELETE."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), OddHandler)
        self.asked, self.may_answer, self.deleted = threading.Event(), threading.Event(), threading.Event()
        self.num_streams = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class OddHandler(BaseHTTPRequestHandler):
    server: OddServer

    def _reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.set()
        self.server.may_answer.wait(20)
        self._reply(202, "application/json", b'{"url": "%s", "events_url": "%s/events"}' % ((JOB_URL.encode(),) * 2))

    def do_GET(self) -> None:
        self.server.num_streams += 1
        self._reply(200, "text/event-stream", b'event: running\ndata: {"step": 0, "num_steps": 0}\n\n')

    def do_DELETE(self) -> None:
        assert self.path == JOB_URL
        self.server.deleted.set()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def odd_server() -> Iterator[OddServer]:
    with OddServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


def test_events_that_never_lead_to_an_end_are_given_up(odd_server: OddServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.generate._RETRY_S", 0.0)
    odd_server.may_answer.set()
    with pytest.raises(Unavailable, match="before the job has ended"):
        generate_there({"prompt": "a fox"}, odd_server.url, lambda step, num_steps: None)
    assert 2 < odd_server.num_streams < 50


def test_ctrl_c_while_the_job_is_being_accepted_cancels_it_and_is_130_even_if_that_fails(
    odd_server: OddServer, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "darkroom", "generate", "a fox", "--url", odd_server.url],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert odd_server.asked.wait(20)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # the signal is on its way before the reply is; in the other order this test passes as well
    odd_server.may_answer.set()
    err = process.communicate(timeout=20)[1]
    assert (process.returncode, err) == (130, "")
    assert odd_server.deleted.is_set()


async def test_models_of_a_server_are_listed(settings: Settings, queue: JobQueue, tmp_path: Path) -> None:
    worker = InstantWorker(queue, card("small-world", license="CC0-1.0"))
    async with served(settings, queue) as server, worker.running():
        code, out, err = await darkroom_beside("models", "--url", f"http://127.0.0.1:{server.port}", cwd=tmp_path)
    assert (code, err) == (0, "")
    header, row = out.splitlines()
    assert header.split() == ["MODEL", "FAMILY", "SIZE", "STEPS", "SAMPLER", "WEIGHTS", "LICENCE"]
    assert row.split() == ["small-world", "test", "64x64", "4", "dpmpp_2m", "0123456789ab", "CC0-1.0"]


def test_event_streams_are_read_with_comments_and_ids() -> None:
    lines = [": ping", "", "event: progress", "id: 1-0", 'data: {"step":1}', "", "event: succeeded", "data: {}", ""]
    assert list(read_events(iter(lines))) == [
        {"event": "progress", "id": "1-0", "data": '{"step":1}'},
        {"event": "succeeded", "data": "{}"},
    ]


def test_one_picture_keeps_its_name_and_several_are_numbered() -> None:
    assert paths_of(Path("out/fox.png"), 1) == [Path("out/fox.png")]
    assert paths_of(Path("out/fox.png"), 2) == [Path("out/fox-0.png"), Path("out/fox-1.png")]


MODELS = ["/models/a", "/models/b"]


def plan(num_workers: int | None, gpus: list[str], num_threads: int = 0) -> list[tuple[list[str], dict[str, str]]]:
    workers = plan_workers(Settings(num_threads=num_threads), MODELS, num_workers, gpus, num_cores=8)
    return [([a for a in worker.arguments if a.startswith("/")], dict(worker.env)) for worker in workers]


def test_without_a_gpu_one_worker_has_every_model_and_all_cores() -> None:
    assert plan(None, []) == [(["/models/a", "/models/b"], {})]


def test_workers_that_share_a_cpu_share_its_cores() -> None:
    both, threads = ["/models/a", "/models/b"], {"DARKROOM_NUM_THREADS": "4"}
    assert plan(2, []) == [(both, threads), (both, threads)]
    assert plan(2, [], num_threads=3) == [(both, {}), (both, {})]


def test_each_gpu_has_a_worker_with_every_model() -> None:
    both = ["/models/a", "/models/b"]
    assert plan(None, ["0", "1"]) == [(both, {"CUDA_VISIBLE_DEVICES": "0"}), (both, {"CUDA_VISIBLE_DEVICES": "1"})]


def test_a_number_of_workers_may_be_asked_for() -> None:
    both = ["/models/a", "/models/b"]
    assert plan(3, ["0", "GPU-1f"]) == [(both, {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in ("0", "GPU-1f", "0")]
    assert plan(1, []) == [(both, {})]


@pytest.mark.parametrize(("named", "found"), [("", []), ("-1", []), ("0,2", ["0", "2"]), ("GPU-1f", ["GPU-1f"])])
def test_the_usual_variable_says_which_gpus_are_visible(
    named: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == found


@pytest.mark.parametrize(
    ("device", "torch_version", "found"),
    [
        ("auto", "2.14.0+cu130", ["0", "2"]),
        ("cuda", "2.14.0+cu130", ["0", "2"]),
        ("cuda:1", "2.14.0+cu130", []),
        ("cpu", "2.14.0+cu130", []),
        ("cuda", "2.14.0+cpu", []),
    ],
)
def test_only_a_numbered_device_or_the_cpu_keeps_workers_from_spreading_over_all_gpus(
    device: str, torch_version: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    monkeypatch.setattr("darkroom.up.version", lambda name: torch_version)
    assert gpus_to_use(device) == found


def test_a_stop_ends_within_five_seconds_even_where_everything_has_to_be_killed() -> None:
    assert sum(STOP_TIMEOUTS_S.values()) < 5
    assert STOP_TIMEOUTS_S["worker"] >= 2.5, "a worker has a tick to finish and jobs to hand back"


def test_processes_take_the_metrics_ports_from_the_setting_upwards(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether they are free is up to what else runs here.
    monkeypatch.setattr("darkroom.up.free_port", lambda host, port, setting: port)
    workers = plan_workers(Settings(metrics_port=9100), MODELS, 2, [], num_cores=2)
    assert [worker.metrics_port for worker in workers] == [9101, 9102]


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:8000"):
        free_port("192.0.2.1", 8000, setting="--port")


def test_the_first_request_survives_a_shell() -> None:
    line = first_request("http://127.0.0.1:8000", [card(example_prompts=["a 'fox' & \"owl\" $HOME"])])
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    assert '{"prompt": "a \'fox\' & \\"owl\\" $HOME"}' in words.splitlines()


def test_the_first_request_names_a_model_when_there_are_several() -> None:
    assert '"model": "one"' in first_request("http://x", [card("one"), card("two")])
    assert "model" not in first_request("http://x", [card("one")])
