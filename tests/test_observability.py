"""Rules, alerts and dashboard: right by promtool's reckoning, and full of data when a real Prometheus watches."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from darkroom import metrics

from deploy.observability.dashboard import PATH, ROWS, dashboard, placed
from tests.support.prometheus import CONFIG, Prometheus, scraping
from tests.support.tiny_models import write_tiny_model
from tests.support.tools import tool
from tests.test_up import Up

ROOT = Path(__file__).parents[1]
RULES = [
    rule
    for path in sorted((CONFIG.parent / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
PANELS = {
    f"{row.title} {panel.title}: {query.legend}": query.expr
    for row in ROWS
    for panel in row.panels
    for query in panel.queries
}
UNIT_TESTS = sorted((CONFIG.parent / "tests").glob("*.yml"))
# What has no data here: there is no GPU (tests/test_gpu_metrics.py shows that its series are exported, and promtool
# that their alert fires), and pictures are kept in Redis (tests/test_result_store.py calls a store).
NO_DATA = ("darkroom_gpu_", "darkroom_result_store_seconds_")


def names_in(expr: str) -> set[str]:
    """The metrics that an expression reads."""
    without_labels = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expr)
    return set(re.findall(r"\b(?:darkroom[_:][\w:]+|process_\w+)", without_labels))


def exported() -> set[str]:
    """The names of all samples that processes of Darkroom can export."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {
        family.name + suffix
        for family in metrics.REGISTRY.collect()
        for suffix in suffixes["gauge" if family.type == "unknown" else family.type]
    }


@pytest.mark.parametrize("name", ["prometheus.yml", "local.yml"])
def test_promtool_accepts_the_configuration_and_its_rules(name: str) -> None:
    command = [tool("promtool"), "check", "config", CONFIG.parent / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(path: Path) -> None:
    done = subprocess.run([tool("promtool"), "test", "rules", path], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_firing_and_not_firing() -> None:
    seen: dict[str, set[bool]] = {name: set() for name in ALERTS}
    for path in UNIT_TESTS:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for expected in case.get("alert_rule_test", []):
                seen[expected["alertname"]].add(bool(expected["exp_alerts"]))
    assert {name for name, cases in seen.items() if cases != {True, False}} == set()


def test_every_alert_says_what_is_wrong_how_much_and_where_to_read_on() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    anchors = {f"docs/operations.md#{title.lower()}" for title in re.findall(r"^### (\w+)$", guide, re.MULTILINE)}
    for name, alert in ALERTS.items():
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        assert "$value" in alert["annotations"]["description"], name
        assert alert["annotations"]["summary"], name
        assert alert["annotations"]["runbook_url"] in anchors, name


def test_rules_and_panels_read_only_metrics_that_exist() -> None:
    known = exported() | set(RECORDED)
    for expr in (*RECORDED.values(), *(alert["expr"] for alert in ALERTS.values()), *PANELS.values()):
        assert names_in(expr) <= known, expr


def test_every_metric_is_shown_on_the_dashboard_or_read_by_a_rule() -> None:
    read = set().union(*map(names_in, (*RECORDED.values(), *(a["expr"] for a in ALERTS.values()), *PANELS.values())))
    for metric in metrics.declared():
        assert any(name.startswith(metric.name) for name in read), metric.name


def test_the_dashboard_in_the_tree_is_what_the_script_makes() -> None:
    assert PATH.read_text() == dashboard(), "python -m deploy.observability.dashboard"


def test_the_dashboard_can_be_read_from_top_to_bottom() -> None:
    titles = [place.title for place in placed() if place.panel is None]
    assert titles == ["Are users happy?", "Where is the time?", "Are the GPUs full?", "What is failing?"]
    taken: set[tuple[int, int]] = set()
    for place in placed():
        cells = {(x, y) for x in range(place.x, place.x + place.width) for y in range(place.y, place.y + place.height)}
        assert not cells & taken, place.title
        assert max(x for x, _ in cells) < 24
        taken |= cells
    described: list[dict[str, Any]] = [p for p in json.loads(dashboard())["panels"] if p["type"] != "row"]
    assert all(panel["description"] for panel in described)
    assert len({panel["title"] + str(panel["gridPos"]) for panel in described}) == len(described)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus beside `darkroom up`, after some load with refusals, a cancellation and a missed deadline."""
    tool("prometheus")
    directory = tmp_path_factory.mktemp("watched")
    models = []
    for name in ("tiny", "untried"):
        model = write_tiny_model(directory / name, "sd1", seed=9)
        card = {"id": name, "num_inference_steps": 4, "width": 64, "height": 64}
        (model / "darkroom.json").write_text(json.dumps(card))
        models += ["--model", str(model)]
    up = Up(directory / "data", "--workers", "1", *models)
    try:
        url = up.wait_ready()
        addresses = [match.groups() for line in up.out if (match := re.search(r"//(\S+)/metrics +(\w+)", line))]
        targets = {
            f"darkroom-{kind}": [address for address, name in addresses if name.startswith(kind)]
            for kind in ("api", "worker")
        }
        with scraping(directory, targets) as prometheus:
            wait_until_equal(lambda: prometheus.values("sum(up)"), [2])
            send_load(url)
            yield prometheus
    finally:
        up.end(signal.SIGINT, timeout_s=30)


def wait_until_equal(look: Callable[[], Any], wanted: object, timeout_s: float = 60.0) -> None:
    """Wait until `look` finds what is wanted; a failure tells what it found last."""
    until = time.monotonic() + timeout_s
    while (found := look()) != wanted:
        assert time.monotonic() < until, found
        time.sleep(0.1)


def send_load(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

        def draw(i: int) -> int:
            size = 64 if i % 3 else 32
            body = {"prompt": f"a cat {i % 4}", "num_inference_steps": 3 + i % 5, "width": size, "height": size}
            body["model"] = "tiny"
            return client.post("/generate", json={**body, "guidance_scale": 1.0 + i % 2 * 4}).status_code

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(draw, range(24))) == {200}
        assert client.post("/generate", json={"prompt": ""}).status_code == 422
        assert client.get("/nowhere").status_code == 404
        asked = {"prompt": "a cat", "model": "tiny", "mode": "async", "num_inference_steps": 200}
        job = client.post("/generate", json=asked).json()["job_id"]
        assert client.delete(f"/jobs/{job}").status_code == 200
        # How long a job takes nobody knows of a model that has drawn nothing, so its deadline is not refused.
        late = {**asked, "model": "untried", "mode": "wait", "deadline_s": 0.001}
        assert client.post("/generate", json=late).status_code == 504


def test_every_expression_has_data_while_darkroom_works(watched: Prometheus) -> None:
    """Of alerts, the part before the comparison: what is compared must be there, or nobody would ever be called."""
    wanted = {
        **PANELS,
        **{name: name for name in RECORDED},
        **{name: re.sub(r" (==|>=|>|<) [\d.]+", "", alert["expr"]) for name, alert in ALERTS.items()},
    }
    wanted = {name: expr for name, expr in wanted.items() if not any(part in expr for part in NO_DATA)}

    def missing() -> set[str]:
        """Those without a series, or with nothing but NaN."""
        found = {
            name: watched.values(expr.replace("$__rate_interval", "1m").replace("$__range", "5m"))
            for name, expr in wanted.items()
        }
        return {name for name, values in found.items() if all(map(math.isnan, values))}

    wait_until_equal(missing, set())


def test_what_prometheus_counted_is_what_was_asked_for(watched: Prometheus) -> None:
    wanted = {
        'darkroom_queue_jobs_total{state="succeeded"}': [24],
        'darkroom_queue_jobs_total{state="cancelled"}': [1],
        'darkroom_queue_jobs_total{state="expired"}': [1],
        'sum(darkroom_rejects_total{reason="invalid_request"})': [1],
        "sum(darkroom_images_total)": [24],
    }

    # The API's counters and the worker's are not read at the same time.
    wait_until_equal(lambda: {expr: watched.values(expr) for expr in wanted}, wanted)
    assert watched.values('ALERTS{alertstate="firing"}') == []
