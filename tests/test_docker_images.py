"""The CPU images are built over a bare Debian and run as docker/compose.yaml runs them. `make test-images` runs this.

Slow, and needs root, buildah and debootstrap; the rest of what is said about docker/ is in test_docker.py.
"""

from __future__ import annotations

import io
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support.compose import ROOT, ComposeRedis, free_port, load_compose
from tests.support.images import Container, Images, what_is_missing

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

GRACE_S = 15.0


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    if reason := what_is_missing():
        pytest.fail(reason)
    with tempfile.TemporaryDirectory(prefix="darkroom-images-") as directory:
        images = Images(Path(directory))
        try:
            images.make_base()
            for target in ("api", "worker-cpu"):
                images.build(target)
            yield images
        finally:
            images.close()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    services = load_compose({"REDIS_PASSWORD": secrets.token_hex(8)})["services"]
    with ComposeRedis(services["redis"]["command"], tmp_path_factory.mktemp("redis")) as server:
        yield server.url


class Service:
    """A container, and the address that its process listens on."""

    def __init__(self, container: Container, url: str) -> None:
        self.container = container
        self.url = url


@pytest.fixture(scope="module")
def api(images: Images, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    port = free_port()
    here = {
        "DARKROOM_PORT": str(port),
        "DARKROOM_METRICS_PORT": str(free_port()),
        "DARKROOM_REDIS_URL": redis_url,
        "DARKROOM_ALLOW_ANONYMOUS": "true",
    }
    container = images.start("api", here, tmp_path_factory.mktemp("api") / "log")
    yield Service(container, f"http://127.0.0.1:{port}")
    container.stop(GRACE_S)


@pytest.fixture(scope="module")
def worker(images: Images, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    port = free_port()
    here = {"DARKROOM_METRICS_PORT": str(port), "DARKROOM_REDIS_URL": redis_url}
    container = images.start("worker-cpu", here, tmp_path_factory.mktemp("worker") / "log")
    yield Service(container, f"http://127.0.0.1:{port}")
    container.stop(GRACE_S)


def wait_until(condition: Callable[[], bool], container: Container, within_s: float = 120) -> None:
    give_up_at = time.monotonic() + within_s
    while not condition():
        assert container.process.poll() is None, container.log.read_text()
        assert time.monotonic() < give_up_at, container.log.read_text()
        time.sleep(0.2)


def test_a_prompt_becomes_a_picture(api: Service, worker: Service) -> None:
    wait_until(api.container.check_health, api.container)
    wait_until(worker.container.check_health, worker.container)
    request = {"prompt": "a cat", "seed": 1, "num_inference_steps": 8}
    reply = httpx.post(f"{api.url}/generate", json=request, headers={"accept": "image/png"}, timeout=60)
    assert reply.status_code == 200, reply.text
    picture = Image.open(io.BytesIO(reply.content))
    assert picture.format == "PNG"
    cards = {card["id"]: card for card in httpx.get(f"{api.url}/models", timeout=60).json()["models"]}
    assert picture.size == (cards["emoji-world"]["width"], cards["emoji-world"]["height"])
    low, high = picture.convert("L").getextrema()
    assert high - low > 50


@pytest.mark.parametrize("name", ["api", "worker"])
def test_a_service_is_a_user_without_rights_under_an_init(name: str, request: pytest.FixtureRequest) -> None:
    container = request.getfixturevalue(name).container
    init = container.init
    assert init.name() == "tini"
    for process in (init, *init.children()):
        assert process.uids() == (10001, 10001, 10001)
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000\n" in status
        assert "CapBnd:\t0000000000000000\n" in status
        assert "NoNewPrivs:\t1\n" in status


@pytest.mark.parametrize("name", ["api", "worker"])
def test_a_service_can_write_its_cache_and_nothing_of_the_image(name: str, request: pytest.FixtureRequest) -> None:
    container = request.getfixturevalue(name).container
    assert container.run("sh", "-c", "touch $HOME/x $TRITON_CACHE_DIR.x /tmp/x").returncode == 0
    assert "Read-only file system" in container.run("touch", "/opt/darkroom/x").stderr


def test_the_api_image_has_no_torch_and_the_worker_image_has_no_cuda(api: Service, worker: Service) -> None:
    find = "import importlib.util as u; print(*(u.find_spec(n) is not None for n in ('darkroom', 'torch', 'triton')))"
    assert api.container.run("python3", "-c", find).stdout == "True False False\n"
    assert worker.container.run("python3", "-c", find).stdout == "True True False\n"


@pytest.mark.parametrize("target", ["api", "worker-cpu"])
def test_an_image_has_no_build_tools_and_no_weights_but_the_models_in_the_box(images: Images, target: str) -> None:
    root = Path(images.buildah("mount", images.buildah("from", target)))
    assert not [tool for tool in ("pip", "gcc", "g++", "make") if list(root.glob(f"usr/bin/{tool}"))]
    assert not list(root.glob("opt/venv/bin/pip*"))
    weights = {path.relative_to(root / "opt/darkroom").parts[:3] for path in root.rglob("*.safetensors")}
    assert weights == {("darkroom", "models", model.name) for model in (ROOT / "server/darkroom/models").iterdir()}


@pytest.mark.parametrize("target", ["api", "worker-cpu"])
def test_an_images_code_is_compiled_because_a_container_cannot_keep_what_it_compiles(
    images: Images, target: str
) -> None:
    root = Path(images.buildah("mount", images.buildah("from", target))) / "opt"
    for package in ("darkroom/darkroom", "venv/lib/python3*/site-packages/fastapi"):
        sources = list(root.glob(f"{package}/*.py"))
        assert sources
        assert len(list(root.glob(f"{package}/__pycache__/*.pyc"))) == len(sources)


def test_sigterm_ends_a_service_in_good_order(api: Service, worker: Service) -> None:
    assert worker.container.stop(GRACE_S) == 0, worker.container.log.read_text()
    assert api.container.stop(GRACE_S) == 0, api.container.log.read_text()
    assert "api_stopped" in api.container.log.read_text()
