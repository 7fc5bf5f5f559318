"""The manifests of deploy/kubernetes: rendered as `kubectl apply -k` would, validated, and compared with the code."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import redis
import yaml
from darkroom import __version__, metrics
from darkroom.api.app import create_app
from darkroom.config import Settings, load_settings
from darkroom.queue import JobQueue
from darkroom.queue.embedded import find_redis_server
from darkroom.queue.keys import Keys
from darkroom.up import STOP_TIMEOUTS_S, free_port
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.jobs import make_job
from tests.support.tools import tool

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu", "keda")
# `sleep` before a stop came with the first; the second is the newest that the validator knows.
KUBERNETES_VERSIONS = ("1.30", "1.37")
CUSTOM_KINDS = ("PodMonitor", "ScaledObject", "TriggerAuthentication")

Object = dict[str, Any]


@functools.cache
def render(directory: Path) -> tuple[Object, ...]:
    """The objects of a kustomization."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(directory)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def overlay(name: str) -> tuple[Object, ...]:
    return render(MANIFESTS / "overlays" / name)


def with_external_redis(directory: Path) -> tuple[Object, ...]:
    """What somebody with a managed Redis writes: the base and one component."""
    place = os.path.relpath(MANIFESTS, directory)
    kustomization = {
        "namespace": "darkroom",
        "resources": [f"{place}/base"],
        "components": [f"{place}/components/external-redis"],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(directory)


def of_kind(objects: tuple[Object, ...], *kinds: str) -> list[Object]:
    return [object_ for object_ in objects if object_["kind"] in kinds]


def named(objects: tuple[Object, ...], kind: str, name: str) -> Object:
    found = [object_ for object_ in of_kind(objects, kind) if object_["metadata"]["name"] == name]
    assert len(found) == 1, f"{kind} {name}: found {len(found)}"
    return found[0]


def pods(objects: tuple[Object, ...]) -> dict[str, Object]:
    """The pod template of each deployment and stateful set, by its component."""
    templates = [object_["spec"]["template"] for object_ in of_kind(objects, "Deployment", "StatefulSet")]
    return {labels_of(template)["app.kubernetes.io/component"]: template for template in templates}


def labels_of(template: Object) -> dict[str, str]:
    labels: dict[str, str] = template["metadata"]["labels"]
    return labels


def container_of(template: Object) -> Object:
    (container,) = template["spec"]["containers"]
    return container


def check(object_: Object, version: str) -> None:
    """Validate strictly: an unknown field is an error."""
    if object_["kind"] in CUSTOM_KINDS:
        schema = json.loads((ROOT / "tests" / "schemas" / f"{object_['kind']}.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(object_)
    else:
        kubernetes_validate.validate(object_, version, strict=True)


# What Kubernetes accepts


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_object_is_valid(version: str, tmp_path: Path) -> None:
    fill = yaml.safe_load((MANIFESTS / "overlays" / "gpu" / "fill-models.yaml").read_text())
    sources = [*map(overlay, OVERLAYS), with_external_redis(tmp_path), (fill,)]
    distinct = {json.dumps(object_, sort_keys=True): object_ for objects in sources for object_ in objects}
    for object_ in distinct.values():
        check(object_, version)


@pytest.mark.parametrize("kind", ["Deployment", "NetworkPolicy", "PodDisruptionBudget", *CUSTOM_KINDS])
def test_a_misspelt_field_is_refused(kind: str) -> None:
    object_ = copy.deepcopy(of_kind(overlay("keda"), kind)[0])
    object_["spec"]["podSelektor"] = {}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(object_, KUBERNETES_VERSIONS[-1])


def test_kedas_scaler_refuses_a_setting_it_does_not_know() -> None:
    object_ = copy.deepcopy(named(overlay("keda"), "ScaledObject", "darkroom-worker"))
    object_["spec"]["triggers"][1]["metadata"]["listSize"] = "3"
    with pytest.raises(jsonschema.ValidationError):
        check(object_, KUBERNETES_VERSIONS[-1])


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_is_in_one_namespace_that_enforces_the_restricted_standard(name: str) -> None:
    objects = overlay(name)
    (namespace,) = of_kind(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = {object_["metadata"].get("namespace") for object_ in objects if object_ is not namespace}
    assert others == {namespace["metadata"]["name"]}


# Pods


def all_pod_specs() -> Iterator[Object]:
    for name in OVERLAYS:
        for template in pods(overlay(name)).values():
            yield template["spec"]
    yield yaml.safe_load((MANIFESTS / "overlays" / "gpu" / "fill-models.yaml").read_text())["spec"]


def test_no_container_has_more_rights_than_it_needs() -> None:
    for spec in all_pod_specs():
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume]
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_every_container_says_what_it_needs_and_where_it_ends() -> None:
    for spec in all_pod_specs():
        for container in spec["containers"]:
            for part in ("requests", "limits"):
                assert container["resources"][part].keys() >= {"cpu", "memory"}
            for volume in spec["volumes"]:
                assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]


def test_images_carry_a_version_and_ours_carry_this_one() -> None:
    for name in OVERLAYS:
        for template in pods(overlay(name)).values():
            image, _, tag = container_of(template)["image"].partition(":")
            assert re.match(r"\d+\.\d+", tag), f"{image} is not pinned"
            if image.startswith("darkroom-"):
                assert tag == __version__


@pytest.mark.parametrize("component", ["api", "worker"])
def test_a_stopping_pod_has_time_for_its_sleep_and_its_drain(component: str) -> None:
    for name in OVERLAYS:
        template = pods(overlay(name))[component]
        before_stop = container_of(template).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert template["spec"]["terminationGracePeriodSeconds"] > before_stop + STOP_TIMEOUTS_S[component]
        if component == "api":
            assert before_stop > 0


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_that_serve_are_disrupted_one_at_a_time(name: str) -> None:
    objects = overlay(name)
    for component in ("api", "worker"):
        budget = named(objects, "PodDisruptionBudget", f"darkroom-{component}")
        assert budget["spec"]["maxUnavailable"] == 1
        assert matches(budget["spec"]["selector"], labels_of(pods(objects)[component]))


# Settings


def environment(objects: tuple[Object, ...], container: Object) -> dict[str, str]:
    """The variables of a container as the kubelet would set them."""
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        variables |= named(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for entry in container.get("env", []):
        source = entry.get("valueFrom", {})
        if "secretKeyRef" in source:
            variables[entry["name"]] = secret_value(source["secretKeyRef"])
        elif "resourceFieldRef" in source:
            part, resource = source["resourceFieldRef"]["resource"].split(".")
            variables[entry["name"]] = str(math.ceil(float(container["resources"][part][resource])))
        else:
            variables[entry["name"]] = entry["value"]
    return variables


def secret_value(reference: Mapping[str, str]) -> str:
    """What the README's command puts into the secret."""
    values = {"url": "redis://:secret@darkroom-redis:6379/0", "password": "secret"}
    assert reference["name"] == "darkroom-redis"
    return values[reference["key"]]


def settings_of(objects: tuple[Object, ...], component: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    variables = environment(objects, container_of(pods(objects)[component]))
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("DARKROOM_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        return load_settings()


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("component", ["api", "worker"])
def test_every_variable_is_a_setting_and_its_value_is_accepted(
    name: str, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = overlay(name)
    container = container_of(pods(objects)[component])
    known = {f"DARKROOM_{field_name.upper()}" for field_name in Settings.model_fields}
    ours = {name for name in environment(objects, container) if name.startswith("DARKROOM_")}
    assert ours <= known
    settings = settings_of(objects, component, monkeypatch)
    assert (settings.host, settings.metrics_host) == ("0.0.0.0", "0.0.0.0")
    assert settings.redis_url == "redis://:secret@darkroom-redis:6379/0"


@pytest.mark.parametrize("name", OVERLAYS)
def test_api_and_workers_share_every_setting_that_goes_into_redis_scripts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, worker = (settings_of(overlay(name), component, monkeypatch) for component in ("api", "worker"))
    for shared in ("shard", "job_ttl_s", "result_ttl_s", "lease_s", "max_failures"):
        assert getattr(api, shared) == getattr(worker, shared)


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_worker_uses_as_many_threads_as_its_limit_grants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = overlay(name)
    limit = container_of(pods(objects)["worker"])["resources"]["limits"]["cpu"]
    assert settings_of(objects, "worker", monkeypatch).num_threads == int(limit)


def test_homes_and_caches_lie_on_volumes_that_can_be_written() -> None:
    for name in OVERLAYS:
        objects = overlay(name)
        for template in pods(objects).values():
            container = container_of(template)
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            writable = [
                mount["mountPath"]
                for mount in container["volumeMounts"]
                if "emptyDir" in volumes.get(mount["name"], {}) and not mount.get("readOnly")
            ]
            for variable, value in environment(objects, container).items():
                if variable == "HOME" or variable.endswith(("_HOME", "_CACHE_DIR")):
                    assert any(Path(value).is_relative_to(path) for path in writable), variable


def test_the_readme_creates_the_secret_that_the_pods_read() -> None:
    command = (MANIFESTS / "README.md").read_text()
    for name in OVERLAYS:
        for template in pods(overlay(name)).values():
            for entry in container_of(template)["env"]:
                reference = entry.get("valueFrom", {}).get("secretKeyRef")
                if reference is not None:
                    assert f"create secret generic {reference['name']}" in command
                    assert f"--from-literal={reference['key']}=" in command


# Ports and probes


def probes(container: Object) -> dict[str, Object]:
    return {name: container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}


@pytest.mark.parametrize("name", OVERLAYS)
def test_container_ports_are_the_ones_the_processes_listen_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = overlay(name)
    for component, expected in (("api", {"http": 8000, "metrics": 9100}), ("worker", {"metrics": 9101})):
        settings = settings_of(objects, component, monkeypatch)
        ports = {port["name"]: port["containerPort"] for port in container_of(pods(objects)[component])["ports"]}
        assert ports == expected
        assert ports["metrics"] == settings.metrics_port
        assert ports.get("http", settings.port) == settings.port


@pytest.mark.parametrize("name", OVERLAYS)
def test_services_and_probes_name_ports_that_exist(name: str) -> None:
    objects = overlay(name)
    for template in pods(objects).values():
        container = container_of(template)
        names = {port["name"] for port in container["ports"]}
        for probe in probes(container).values():
            for way in ("httpGet", "tcpSocket"):
                assert way not in probe or probe[way]["port"] in names
    for service in of_kind(objects, "Service"):
        selected = [
            pod for pod in pods(objects).values() if labels_of(pod).items() >= service["spec"]["selector"].items()
        ]
        assert len(selected) == 1
        names = {port["name"] for port in container_of(selected[0])["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_the_apis_probes_ask_for_paths_that_it_serves() -> None:
    paths = create_app(Settings(redis_url="redis://127.0.0.1:1")).openapi()["paths"]
    asked = probes(container_of(pods(overlay("cpu"))["api"]))
    assert {probe["httpGet"]["path"] for probe in asked.values()} <= paths.keys()


def test_a_workers_probes_tell_warming_up_from_ready() -> None:
    asked = probes(container_of(pods(overlay("gpu"))["worker"]))

    def passed(is_ready: bool) -> set[str]:
        port = metrics.serve_metrics("127.0.0.1", 0, lambda: is_ready)
        return {name for name, probe in asked.items() if status(port, probe["httpGet"]["path"]) == 200}

    assert passed(is_ready=False) == {"livenessProbe"}
    assert passed(is_ready=True) == asked.keys()


def status(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("component", ["api", "worker"])
def test_a_large_model_may_take_half_an_hour_to_load(component: str) -> None:
    for name in OVERLAYS:
        probe = container_of(pods(overlay(name))[component])["startupProbe"]
        assert probe["httpGet"]["path"] == "/health/ready"
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


# Selectors and the network


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """A label selector, as far as it is used here. An empty one matches everything."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod with its labels and its namespace's, or an address outside."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: Mapping[str, str] = field(default_factory=dict)
    is_pod: bool = True


HOME = {"kubernetes.io/metadata.name": "darkroom"}
API, WORKER, REDIS = (
    Peer(component, {"app.kubernetes.io/name": "darkroom", "app.kubernetes.io/component": component}, HOME)
    for component in ("api", "worker", "redis")
)
NEIGHBOUR = Peer("a pod beside", {"app": "debug"}, HOME)
CLIENT = Peer("an application", {"app": "shop"}, {"kubernetes.io/metadata.name": "shop", "darkroom-client": "true"})
STRANGER = Peer("a stranger", {"app": "shop"}, {"kubernetes.io/metadata.name": "elsewhere"})
PROMETHEUS = Peer("Prometheus", {"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"})
KEDA = Peer("KEDA", {"app": "keda-operator"}, {"kubernetes.io/metadata.name": "keda"})
DNS = Peer("DNS", {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})
INTERNET = Peer("the internet", is_pod=False)
PORT_NAMES = {8000: "http", 9100: "metrics", 9101: "metrics", 6379: "redis"}


def admits(policies: list[Object], direction: str, pod: Peer, other: Peer, port: int) -> bool:
    """Whether the policies that select a pod of this namespace let it talk to `other`, in this direction."""
    if pod.namespace != HOME:
        return True
    selecting = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], pod.labels)
    ]
    rules = [rule for spec in selecting for rule in spec.get(direction.lower(), [])]
    side = {"Ingress": "from", "Egress": "to"}[direction]
    return not selecting or any(
        any(entry["port"] in (port, PORT_NAMES.get(port)) for entry in rule["ports"])
        and (side not in rule or any(is_peer(entry, other) for entry in rule[side]))
        for rule in rules
    )


def is_peer(entry: Object, other: Peer) -> bool:
    if "ipBlock" in entry:
        return not other.is_pod
    if not other.is_pod:
        return False
    namespace = entry.get("namespaceSelector", {"matchLabels": HOME})
    return matches(namespace, other.namespace) and matches(entry.get("podSelector", {}), other.labels)


def can_reach(objects: tuple[Object, ...], source: Peer, target: Peer, port: int) -> bool:
    policies = of_kind(objects, "NetworkPolicy")
    leaves = admits(policies, "Egress", source, target, port)
    return leaves and admits(policies, "Ingress", target, source, port)


WAYS = [
    (CLIENT, API, 8000), (NEIGHBOUR, API, 8000), (STRANGER, API, 8000), (INTERNET, API, 8000), (CLIENT, API, 9100),
    (CLIENT, WORKER, 9101), (API, WORKER, 9101), (STRANGER, WORKER, 9101),
    (API, REDIS, 6379), (WORKER, REDIS, 6379), (CLIENT, REDIS, 6379), (STRANGER, REDIS, 6379), (NEIGHBOUR, REDIS, 6379),
    (PROMETHEUS, API, 9100), (PROMETHEUS, WORKER, 9101), (PROMETHEUS, REDIS, 6379), (KEDA, REDIS, 6379),
    (API, DNS, 53), (WORKER, DNS, 53), (WORKER, INTERNET, 443), (API, INTERNET, 443), (REDIS, INTERNET, 443),
    (WORKER, INTERNET, 6379), (WORKER, API, 8000),
]  # fmt: skip
OPEN = {
    ("an application", "api", 8000),
    ("api", "redis", 6379),
    ("worker", "redis", 6379),
    ("api", "DNS", 53),
    ("worker", "DNS", 53),
}
SCRAPED = {("Prometheus", "api", 9100), ("Prometheus", "worker", 9101)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cpu", OPEN), ("gpu", OPEN | SCRAPED), ("keda", OPEN | SCRAPED | {("KEDA", "redis", 6379)})],
)
def test_the_network_lets_through_what_is_needed_and_nothing_else(
    name: str, expected: set[tuple[str, str, int]]
) -> None:
    objects = overlay(name)
    reached = {
        (source.name, target.name, port) for source, target, port in WAYS if can_reach(objects, source, target, port)
    }
    assert reached == expected


def test_a_managed_redis_takes_the_place_of_the_one_in_the_cluster(tmp_path: Path) -> None:
    objects = with_external_redis(tmp_path)
    assert pods(objects).keys() == {"api", "worker"}
    for template in pods(objects).values():
        references = [e["valueFrom"].get("secretKeyRef") for e in container_of(template)["env"] if "valueFrom" in e]
        assert [reference["key"] for reference in references if reference] == ["url"]
    assert can_reach(objects, API, INTERNET, 6379)
    assert can_reach(objects, WORKER, INTERNET, 6379)
    assert not can_reach(objects, WORKER, INTERNET, 443)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_selector_selects_a_pod(name: str) -> None:
    objects = overlay(name)
    labels = [labels_of(template) for template in pods(objects).values()]
    selectors = [policy["spec"]["podSelector"] for policy in of_kind(objects, "NetworkPolicy")]
    selectors += [object_["spec"]["selector"] for object_ in of_kind(objects, "PodDisruptionBudget", "PodMonitor")]
    for template in pods(objects).values():
        selectors += [spread["labelSelector"] for spread in template["spec"].get("topologySpreadConstraints", [])]
    for selector in selectors:
        assert any(matches(selector, one) for one in labels), selector


@pytest.mark.parametrize("name", ["gpu", "keda"])
def test_prometheus_finds_the_metrics_of_api_and_workers(name: str) -> None:
    objects = overlay(name)
    (monitor,) = of_kind(objects, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    selected = [pod for pod in pods(objects).values() if matches(monitor["spec"]["selector"], labels_of(pod))]
    assert selected == [pods(objects)["api"], pods(objects)["worker"]]
    for template in selected:
        assert endpoint["port"] in {port["name"] for port in container_of(template)["ports"]}


# Redis


@pytest.fixture(scope="module")
def redis_of_the_manifests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A redis-server started as the stateful set does, with its configuration file and its arguments."""
    objects = overlay("cpu")
    container = container_of(pods(objects)["redis"])
    (config,) = [item for item in of_kind(objects, "ConfigMap") if "redis.conf" in item["data"]]
    (data,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "data"]
    directory = tmp_path_factory.mktemp("redis")
    path, port = directory / "redis.conf", free_port("127.0.0.1", 0, setting="redis")
    path.write_text(config["data"]["redis.conf"].replace(f"dir {data}\n", f"dir {directory}\n"))
    password = environment(objects, container)["REDISCLI_AUTH"]
    mounted, *options = [argument.replace("$(REDISCLI_AUTH)", password) for argument in container["args"]]
    assert mounted == "/etc/redis/redis.conf"
    process = subprocess.Popen(
        [find_redis_server(), str(path), *options, "--bind", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        said = list(itertools.takewhile(lambda line: "accept connections" not in line, process.stdout))
        try:
            assert process.poll() is None, said
            with redis.Redis(port=port, password=password, decode_responses=True) as client:
                yield client
        finally:
            process.terminate()
            process.wait(10)


def port_of(client: redis.Redis) -> int:
    return int(client.connection_pool.connection_kwargs["port"])


def test_redis_keeps_every_accepted_job_and_evicts_none(redis_of_the_manifests: redis.Redis) -> None:
    promised = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": ""}
    found = {name: redis_of_the_manifests.config_get(name)[name] for name in promised}
    assert found == promised


def test_redis_asks_for_the_password(redis_of_the_manifests: redis.Redis) -> None:
    nobody = redis.Redis(port=port_of(redis_of_the_manifests), retry=Retry(NoBackoff(), 0))
    with nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()


def test_redis_has_room_to_rewrite_its_file_at_its_memory_limit(redis_of_the_manifests: redis.Redis) -> None:
    container = container_of(pods(overlay("cpu"))["redis"])
    limit = re.fullmatch(r"(\d+)Gi", container["resources"]["limits"]["memory"])
    assert limit is not None
    maxmemory = int(redis_of_the_manifests.config_get("maxmemory")["maxmemory"])
    assert int(limit[1]) << 30 >= 2 * maxmemory > 0


# All of it


@contextlib.contextmanager
def running(component: str, redis_port: int, home: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, int]]]:
    """A process with the arguments and variables of its container, but for what this machine has otherwise.

    Yields it with its ports by name.
    """
    objects = overlay("cpu")
    container = container_of(pods(objects)[component])
    ports = {port["name"]: free_port("127.0.0.1", 0, setting=port["name"]) for port in container["ports"]}
    variables = environment(objects, container)
    here = {
        "DARKROOM_REDIS_URL": variables["DARKROOM_REDIS_URL"].replace("darkroom-redis:6379", f"127.0.0.1:{redis_port}"),
        "DARKROOM_HOST": "127.0.0.1",
        "DARKROOM_METRICS_HOST": "127.0.0.1",
        "DARKROOM_PORT": str(ports.get("http", 0)),
        "DARKROOM_METRICS_PORT": str(ports["metrics"]),
        "DARKROOM_NUM_THREADS": "1",
        **{name: str(home) for name in variables if name == "HOME" or name.endswith(("_HOME", "_CACHE_DIR"))},
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "darkroom", *container["args"]],
        env={**clean, **variables, **here},
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process, ports
    finally:
        process.kill()
        process.wait()


def probe_until_it_passes(component: str, process: subprocess.Popen[bytes], ports: Mapping[str, int]) -> list[int]:
    """Ask as the kubelet does for a start; the answers, 0 where nobody listened."""
    probe = container_of(pods(overlay("cpu"))[component])["startupProbe"]["httpGet"]
    answers = []
    while not answers or answers[-1] != 200:
        assert process.poll() is None
        time.sleep(0.05)
        try:
            answers.append(status(ports[probe["port"]], probe["path"]))
        except OSError:
            answers.append(0)
    return answers


def test_what_the_pods_run_comes_up_draws_a_picture_and_stops_in_time(
    redis_of_the_manifests: redis.Redis, tmp_path: Path
) -> None:
    redis_port = port_of(redis_of_the_manifests)
    with running("api", redis_port, tmp_path) as (api, at), running("worker", redis_port, tmp_path) as (worker, beside):
        before = probe_until_it_passes("worker", worker, beside)[:-1]
        assert set(before) <= {0, 503}
        probe_until_it_passes("api", api, at)
        body = json.dumps({"prompt": "a cat", "seed": 3, "num_inference_steps": 2}).encode()
        headers = {"content-type": "application/json", "accept": "image/png"}
        call = urllib.request.Request(f"http://127.0.0.1:{at['http']}/generate", body, headers)
        with urllib.request.urlopen(call, timeout=60) as reply:
            assert reply.read().startswith(b"\x89PNG")
        for process, component in ((api, "api"), (worker, "worker")):
            process.send_signal(signal.SIGTERM)
            spec = pods(overlay("cpu"))[component]["spec"]
            assert process.wait(spec["terminationGracePeriodSeconds"]) == 0


# GPUs and scaling


@pytest.mark.parametrize("name", ["gpu", "keda"])
def test_a_gpu_worker_has_one_gpu_and_takes_no_second_one_during_a_roll_out(name: str) -> None:
    objects = overlay(name)
    worker = named(objects, "Deployment", "darkroom-worker")
    resources = container_of(worker["spec"]["template"])["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
    assert worker["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    tolerated = worker["spec"]["template"]["spec"]["tolerations"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in tolerated


def test_a_gpu_worker_reads_its_model_from_the_volume_and_cannot_write_there() -> None:
    template = pods(overlay("gpu"))["worker"]
    container = container_of(template)
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "models"]
    (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "models"]
    assert mount["readOnly"] is volume["persistentVolumeClaim"]["readOnly"] is True
    named(overlay("gpu"), "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
    command, option, path = container["args"]
    assert (command, option) == ("worker", "--model")
    assert Path(path).is_relative_to(mount["mountPath"])


def scaling() -> Object:
    spec: Object = named(overlay("keda"), "ScaledObject", "darkroom-worker")["spec"]
    return spec


def trigger(kind: str) -> Object:
    (found,) = [trigger for trigger in scaling()["triggers"] if trigger["type"] == kind]
    return found


def test_the_autoscaler_alone_says_how_many_workers_there_are() -> None:
    target = named(overlay("keda"), "Deployment", scaling()["scaleTargetRef"]["name"])
    assert "replicas" not in target["spec"]
    assert named(overlay("gpu"), "Deployment", "darkroom-worker")["spec"]["replicas"] >= 1


def test_a_model_never_loses_its_last_worker_to_the_autoscaler() -> None:
    assert scaling()["minReplicaCount"] >= 1


def test_the_autoscalers_queries_name_metrics_that_exist() -> None:
    exported = {family.name for family in metrics.REGISTRY.collect()}
    query = trigger("prometheus")["metadata"]["query"]
    asked = set(re.findall(r"darkroom_\w+", query))
    assert asked
    assert asked <= exported
    assert set(re.findall(r'namespace="([^"]*)"', query)) == {"darkroom"}


SERIES = {
    "a queue that never had a job": (['darkroom_queue_reachable{namespace="darkroom"} 1'], 0),
    "two processes that see the same two models": (
        [
            f'darkroom_queue_backlog_seconds{{namespace="darkroom",model="{model}",pod="{pod}"}} {seconds}'
            for model, seconds in (("a", 40), ("b", 2))
            for pod in ("one", "two")
        ]
        + ['darkroom_queue_reachable{namespace="darkroom"} 1'],
        42,
    ),
    "a queue that cannot be reached": (['darkroom_queue_reachable{namespace="darkroom"} 0'], None),
    "a queue of another namespace": (
        [
            'darkroom_queue_backlog_seconds{namespace="other",model="a"} 9',
            'darkroom_queue_reachable{namespace="other"} 1',
        ],
        None,
    ),
}


@pytest.mark.parametrize("case", SERIES)
def test_the_backlog_query_returns_one_number_or_nothing(case: str, tmp_path: Path) -> None:
    series, expected = SERIES[case]
    samples = [] if expected is None else [{"labels": "{}", "value": expected}]
    unit_test = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": name, "values": f"{value}x4"} for name, value in (line.rsplit(" ", 1) for line in series)
                ],
                "promql_expr_test": [
                    {"expr": trigger("prometheus")["metadata"]["query"], "eval_time": "30s", "exp_samples": samples}
                ],
            }
        ],
    }
    path = tmp_path / "query.yaml"
    path.write_text(yaml.safe_dump(unit_test))
    done = subprocess.run(
        [tool("promtool"), "test", "rules", str(path)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def test_kedas_second_trigger_counts_the_waiting_jobs(
    queue: JobQueue, settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = settings_of(overlay("keda"), "api", monkeypatch).shard
    watched = trigger("redis")["metadata"]["listName"]
    assert watched.startswith(Keys(shard).prefix)
    key = watched.replace(Keys(shard).prefix, Keys(settings.shard).prefix)
    for _ in range(3):
        await queue.enqueue(make_job(), result_bytes=1000)
    with redis.Redis.from_url(redis_url) as client:
        # KEDA takes LLEN of a list, ZCARD of a sorted set, and 0 where there is no key.
        assert client.type(key) == b"zset"
        assert client.zcard(key) == 3


def test_kedas_second_trigger_finds_redis_and_its_password() -> None:
    objects = overlay("keda")
    name, namespace = trigger("redis")["metadata"]["address"].partition(":")[0].split(".")[:2]
    service = named(objects, "Service", name)
    assert namespace == service["metadata"]["namespace"]
    authentication = named(objects, "TriggerAuthentication", trigger("redis")["authenticationRef"]["name"])
    (parameter,) = authentication["spec"]["secretTargetRef"]
    assert parameter["parameter"] == "password"
    assert secret_value(parameter) == "secret"
