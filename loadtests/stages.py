"""Run one stage of load and sum it up."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arrivals import percentile
from loadtests.scrape import Ticks

# The generator shares the machine with the server: above this share of a core it takes part in the result.
MAX_GENERATOR_SHARE = 0.5


@dataclass(frozen=True)
class Target:
    """A server to load, and where its workers' metrics are."""

    name: str
    url: str
    metrics: Sequence[str] = ()


@dataclass(frozen=True)
class Stage:
    """What one stage showed. Latencies are of the pictures that ended within its `seconds`, failures left out.

    `errors` counts by kind, pictures and other calls together. `cpu_share` is what the generator took of one core.
    `by_name` has the latencies of each kind of call.
    """

    part: str
    label: str
    server: str
    users: dict[str, int]
    rate: float | None
    seconds: float
    images: int
    images_s: float
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    errors: dict[str, int]
    rows_per_tick: float | None
    padded_rows_per_tick: float | None
    cpu_share: float
    by_name: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def num_users(self) -> int:
        return sum(self.users.values())

    @property
    def key(self) -> tuple[str, str, str]:
        """What two runs are compared by."""
        return self.part, self.server, self.label

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def latencies_of(values: list[float]) -> dict[str, float | None]:
    """p50, p95 and p99 of seconds; None without any."""
    return {
        f"p{share}_s": percentile(values, share / 100) if values else None  # the three that the tables show
        for share in (50, 95, 99)
    }


def summarise(seen: dict[str, Any], *, part: str, label: str, server: str) -> Stage:
    """Reduce what the generator saw to figures. Only what ended within the measured window counts."""
    begin, seconds = seen["started_at"], seen["seconds"]
    within = [sample for sample in seen["samples"] if begin <= sample[1] <= begin + seconds]
    pictures = [(latency, images) for _, _, latency, images, error in within if images and not error]
    names: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(sample[0] for sample in within):
        of_name = [sample for sample in within if sample[0] == name]
        good = [latency for _, _, latency, _, error in of_name if not error]
        names[name] = {
            "calls": len(of_name),
            **latencies_of(good),
            "errors": dict(Counter(sample[4] for sample in of_name if sample[4])),
        }
    ticks = Ticks(**seen["ticks"]) if seen["ticks"] else None
    num_images = sum(images for _, images in pictures)
    return Stage(
        part=part,
        label=label,
        server=server,
        users=seen["users"],
        rate=seen["rate"],
        seconds=seconds,
        images=num_images,
        images_s=num_images / seconds,
        **latencies_of([latency for latency, _ in pictures]),
        errors=dict(Counter(sample[4] for sample in within if sample[4])),
        rows_per_tick=ticks.rows_per_tick if ticks else None,
        padded_rows_per_tick=ticks.padded_rows_per_tick if ticks else None,
        cpu_share=seen["cpu_s"] / seconds,
        by_name=names,
    )


def generate(target: Target, users: dict[str, int], **options: float) -> dict[str, Any]:
    """Run the generator in a process of its own; `options` are its command line's. Returns what it saw.

    Raises `RuntimeError` when the generator fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "seen.json"
        command = [sys.executable, "-m", "loadtests.generator", "--url", target.url, "--out", str(out)]
        command += ["--users", *(f"{name}:{count}" for name, count in users.items())]
        command += ["--metrics", *target.metrics]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
        if done.returncode or not out.exists():
            raise RuntimeError(f"the generator failed with code {done.returncode}:\n{done.stderr}")
        seen: dict[str, Any] = json.loads(out.read_text())
        return seen


def run_stage(target: Target, users: dict[str, int], *, part: str, label: str, **options: float) -> Stage:
    """Load `target` with `users` and sum up; `options` are the generator's."""
    return summarise(generate(target, users, **options), part=part, label=label, server=target.name)
