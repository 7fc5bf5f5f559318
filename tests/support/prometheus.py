"""A real Prometheus that scrapes processes of ours, fast."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from darkroom.up import free_port

from tests.support.tools import tool

CONFIG = Path(__file__).parents[2] / "deploy" / "observability" / "prometheus" / "prometheus.yml"


class Prometheus:
    """The HTTP API of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10, trust_env=False)

    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def values(self, expr: str) -> list[float]:
        """The values of an expression now, one for each series. Raises what Prometheus finds wrong with it."""
        reply: dict[str, Any] = self._client.get("/api/v1/query", params={"query": expr}).json()
        assert reply["status"] == "success", (expr, reply)
        return [float(series["value"][1]) for series in reply["data"]["result"]]

    def close(self) -> None:
        self._client.close()


@contextmanager
def scraping(directory: Path, targets: Mapping[str, Sequence[str]], interval: str = "300ms") -> Iterator[Prometheus]:
    """Run Prometheus with the configuration and rules of the tree, but with these `targets` by job."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(CONFIG.parent / pattern) for pattern in config["rule_files"]]
    for scrape in config["scrape_configs"]:
        scrape.pop("dns_sd_configs", None)
        scrape["static_configs"] = [{"targets": list(targets[scrape["job_name"]])}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port("127.0.0.1", 0, setting="port")
    command = [tool("prometheus"), f"--config.file={directory / 'prometheus.yml'}", "--log.level=warn"]
    command += [f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        until = time.monotonic() + 30
        while not prometheus.is_ready():
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < until, (directory / "log").read_text()
            time.sleep(0.05)
        yield prometheus
    finally:
        prometheus.close()
        process.terminate()
        process.wait(30)
