"""docker/: the Dockerfile is clean, and what compose.yaml says of Redis and of every service holds."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from darkroom.worker import worker as worker_module
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.compose import COMPOSE, ROOT, ComposeRedis, load_compose
from tests.support.tools import tool

PASSWORD = secrets.token_hex(8)
SERVICES: dict[str, dict[str, Any]] = load_compose({"REDIS_PASSWORD": PASSWORD})["services"]
OWN_SERVICES = {name: service for name, service in SERVICES.items() if "build" in service}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def test_the_dockerfile_is_clean() -> None:
    done = run(tool("hadolint"), "docker/Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_keeps_to_the_schema_of_compose_files() -> None:
    done = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_starts_without_a_password() -> None:
    with pytest.raises(KeyError, match="REDIS_PASSWORD"):
        load_compose({})


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


@pytest.mark.parametrize("name", SERVICES)
def test_only_this_machine_reaches_a_published_port_and_no_metrics_are_published(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not {port.rpartition(":")[2] for port in ports} & {"6379", "9100", "9101"}


@pytest.mark.parametrize("name", OWN_SERVICES)
def test_a_service_of_ours_waits_for_redis_and_is_built_from_a_target_of_the_dockerfile(name: str) -> None:
    service = OWN_SERVICES[name]
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert f" AS {service['build']['target']}\n" in (ROOT / service["build"]["dockerfile"]).read_text()


def test_a_worker_is_killed_long_after_its_drain_has_ended() -> None:
    drain_s = worker_module.HAND_BACK_STOP_S
    for name in ("worker-cpu", "worker-gpu"):
        assert seconds(SERVICES[name]["stop_grace_period"]) > 2 * drain_s


def test_a_model_of_ones_own_is_an_option_of_the_worker() -> None:
    def command(**variables: str) -> list[str]:
        services = load_compose({"REDIS_PASSWORD": PASSWORD, **variables})["services"]
        return str(services["worker-cpu"]["command"]).split()

    assert command() == ["worker"]
    assert command(DARKROOM_MODEL="/models/sdxl") == ["worker", "--model", "/models/sdxl"]


@pytest.fixture
def compose_redis(tmp_path: Path) -> Iterator[redis.Redis]:
    with ComposeRedis(SERVICES["redis"]["command"], tmp_path) as server, server.client() as client:
        yield client


def test_redis_keeps_every_write_and_evicts_nothing(compose_redis: redis.Redis) -> None:
    config = compose_redis.config_get("append*", "maxmemory*", "save")
    assert (config["appendonly"], config["appendfsync"]) == ("yes", "always")
    assert (config["maxmemory-policy"], config["maxmemory"]) == ("noeviction", str(1 << 30))
    assert config["save"] == ""


def test_redis_answers_nobody_without_the_password(compose_redis: redis.Redis) -> None:
    port = compose_redis.connection_pool.connection_kwargs["port"]
    with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


@pytest.mark.parametrize("image", ["api", "worker-cpu", "worker-gpu"])
def test_an_image_installs_what_the_project_requires_at_versions_that_are_pinned(image: str) -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    command = re.search(rf"python3 (docker/requirements.py.*) > {image}.txt", dockerfile)
    assert command is not None
    requirements = run(sys.executable, *command[1].split()).stdout.splitlines()
    names = {re.split(r"[\s<>=!~;\[]", line)[0] for line in requirements}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(requirements) > len(project["dependencies"])
    pinned = {
        re.split("[=<>]", line)[0].replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    # The Dockerfile names the release of torch.
    assert names - pinned == (set() if image == "api" else {"torch"})
