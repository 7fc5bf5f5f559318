"""Compare two runs: `python -m loadtests.compare RUN_A RUN_B` prints B over A for every stage that both have."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RATIOS = ("images_s", "p50_s", "p95_s", "p99_s", "rows_per_tick")
OVERLOAD_FIGURES = ("accepted_on_first_retry", "median_over_wait", "latency_ratio")


def load(path: Path) -> dict[str, Any]:
    """The results of a run: its directory, or the `results.json` in it. Raises `OSError` and `ValueError`."""
    results: dict[str, Any] = json.loads((path / "results.json" if path.is_dir() else path).read_text())
    return results


def ratio(a: float | None, b: float | None) -> float | None:
    """`b / a`; None where either is missing or `a` is 0."""
    return None if a is None or b is None or a == 0 else b / a


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each stage of both runs: its name, the ratios b over a, and the errors of each."""

    def key(stage: dict[str, Any]) -> tuple[str, str, str]:
        return stage["part"], stage["server"], stage["label"]

    of_a = {key(stage): stage for stage in a["stages"]}
    rows = []
    for stage in b["stages"]:
        if (earlier := of_a.get(key(stage))) is None:
            continue
        row = {"stage": " · ".join(key(stage)), **{name: ratio(earlier[name], stage[name]) for name in RATIOS}}
        rows.append({**row, "errors": (sum(earlier["errors"].values()), sum(stage["errors"].values()))})
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line, `words` in place of the process's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    arguments = parser.parse_args(words)
    a, b = load(arguments.a), load(arguments.b)
    table = Table(title=f"{b['commit']} over {a['commit']}: 1.10 is 10 % more")
    for heading in ("stage", *(name.removesuffix("_s") for name in RATIOS), "errors"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in compare(a, b):
        ratios = ("–" if row[name] is None else f"{row[name]:.2f}" for name in RATIOS)
        table.add_row(row["stage"], *ratios, "{} → {}".format(*row["errors"]))
    console = Console(width=None if sys.stdout.isatty() else 150)
    if not table.row_count:
        raise SystemExit("the two runs have no stage in common")
    console.print(table)
    if a.get("overload") and b.get("overload"):
        for name in OVERLOAD_FIGURES:
            before, after = a["overload"][name], b["overload"][name]
            console.print(f"overload, {name}: {_shown(before)} → {_shown(after)}")
    if a["device"] != b["device"]:
        console.print(f"[yellow]not the same machine: {a['device']}; {b['device']}[/yellow]")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
