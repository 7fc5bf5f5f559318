"""The metrics of a GPU, by the real NVML binding over a library that stands in for the driver's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import tool

SOURCE = Path(__file__).parent / "support" / "nvml_stub.c"
# Prints the series of GPUs as a scrape would see them, once their errors have been counted.
PROGRAM = """
import sys
from darkroom import metrics
from darkroom.worker.gpu import watch_driver
for uuid in sys.argv[1:]:
    thread = watch_driver(uuid)
    if thread is not None:
        thread.join(30)
print(metrics.exposition()[0].decode())
"""


def series_of(library_path: Path, *uuids: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *uuids],
        env={**os.environ, "LD_LIBRARY_PATH": str(library_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    series = (line for line in done.stdout.splitlines() if line.startswith("darkroom_gpu") and "_created" not in line)
    pairs = (line.removeprefix("darkroom_gpu_").rsplit(" ", 1) for line in series)
    return {name: float(number) for name, number in pairs}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("driver")
    subprocess.run([tool("gcc"), "-shared", "-fPIC", "-o", directory / "libnvidia-ml.so.1", SOURCE], check=True)
    return directory


def test_a_gpu_shows_what_the_driver_supports_of_it(driver: Path) -> None:
    """The second is a slice of a GPU, of which a driver tells the memory only; the third is not there."""
    assert series_of(driver, "1c4a7ac3-0000", "2d5b8bd4-0000", "33333333-0000") == {
        'memory_bytes{gpu="1c4a7ac3",kind="used"}': 600,
        'memory_bytes{gpu="1c4a7ac3",kind="total"}': 1000,
        'utilization_ratio{gpu="1c4a7ac3"}': 0.75,
        'power_watts{gpu="1c4a7ac3"}': 312.5,
        'temperature_celsius{gpu="1c4a7ac3"}': 61,
        'xid_errors_total{gpu="1c4a7ac3",xid="79"}': 1,
        'memory_bytes{gpu="2d5b8bd4",kind="used"}': 600,
        'memory_bytes{gpu="2d5b8bd4",kind="total"}': 1000,
    }


def test_without_a_driver_there_are_no_series_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    assert series_of(tmp_path, "1c4a7ac3-0000") == {}
