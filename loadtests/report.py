"""A run on the screen and on disk: tables, Markdown, CSV, JSON and plots."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtests.overload import Overload, Visit, free_times
from loadtests.stages import MAX_GENERATOR_SHARE, Stage

HEADINGS = (
    "server", "load", "images", "images/s", "p50 s", "p95 s", "p99 s",
    "rows/tick", "padded/tick", "generator", "errors",
)  # fmt: skip
# The least load that gives this share of the most images/s is called the knee.
KNEE_SHARE = 0.9


def shown(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def error_text(errors: dict[str, int]) -> str:
    """`3 x 429 queue_full, 1 x Timeout`, or 0."""
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(errors.items())) or "0"


def row_of(stage: Stage) -> list[str]:
    mark = " !" if stage.cpu_share > MAX_GENERATOR_SHARE else ""
    return [
        stage.server,
        stage.label,
        str(stage.images),
        shown(stage.images_s),
        shown(stage.p50_s),
        shown(stage.p95_s),
        shown(stage.p99_s),
        shown(stage.rows_per_tick, 1),
        shown(stage.padded_rows_per_tick, 1),
        f"{stage.cpu_share:.0%}{mark}",
        error_text(stage.errors),
    ]


def name_rows(stages: Sequence[Stage]) -> list[list[str]]:
    """Latencies of each kind of call, for the stages that have more than one."""
    return [
        [stage.label, name, str(found["calls"]), *(shown(found[f"p{share}_s"], 3) for share in (50, 95, 99)),
         error_text(found["errors"])]
        for stage in stages if len(stage.by_name) > 1
        for name, found in stage.by_name.items()
    ]  # fmt: skip


NAME_HEADINGS = ("load", "call", "count", "p50 s", "p95 s", "p99 s", "errors")


def overload_rows(overload: Overload) -> list[list[str]]:
    """What is asked of an overloaded server, what was found, and what is aimed at."""
    return [
        ["refused, of all clients", f"{overload.refused} of {overload.clients}", ""],
        ["refusals without Retry-After", str(overload.refused_without_retry_after), "0"],
        [
            "time to a refusal, p50 and p99",
            f"{shown(overload.p50_refusal_s)} and {shown(overload.p99_refusal_s)} s",
            "≤ 0.05",
        ],
        ["accepted on the first retry at Retry-After", shown(overload.accepted_on_first_retry), "≥ 0.90"],
        ["never accepted", str(overload.never_accepted), "0"],
        ["wait told at first, median", f"{shown(overload.median_told_s)} s", ""],
        ["over-wait over the wait told, median", shown(overload.median_over_wait), "≤ 0.25"],
        ["the same, p95", shown(overload.p95_over_wait), ""],
        ["over-wait, median", f"{shown(overload.median_over_wait_s)} s", ""],
        ["p95 of accepted requests", f"{shown(overload.p95_accepted_s)} s", ""],
        ["that over p95 at saturation", shown(overload.latency_ratio), "about 1"],
        [
            "images/s when refused clients do not come back, over saturation's",
            shown(overload.fickle_images_s / overload.capacity_images_s),
            "about 1",
        ],
        ["other errors", error_text(overload.errors), "0"],
    ]


OVERLOAD_HEADINGS = ("figure", "measured", "target")


def knee(stages: Sequence[Stage]) -> Stage | None:
    """The stage of least load with `KNEE_SHARE` of the most images/s; None without pictures."""
    most = max((stage.images_s for stage in stages), default=0.0)
    enough = [stage for stage in stages if stage.images_s >= KNEE_SHARE * most > 0]
    return min(enough, key=lambda stage: stage.num_users, default=None)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("server", "load", "call", "figure") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


class Report:
    """Prints each part as it is measured and keeps everything for the directory."""

    def __init__(self, about: dict[str, Any], console: Console | None = None) -> None:
        self.about = about
        # Into a file or a pipe the tables go in full.
        self.console = console or Console(width=None if sys.stdout.isatty() else 150)
        self.stages: list[Stage] = []
        self.overload: Overload | None = None
        self.visits: list[Visit] = []

    def add(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.console.print(
            f"  {stage.server}, {stage.label}: {stage.images_s:.2f} images/s, p95 {shown(stage.p95_s)} s, "
            f"errors {error_text(stage.errors)}",
            highlight=False,
        )

    def of(self, part: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.part == part]

    def sections(self) -> list[tuple[str, str, Sequence[str], list[list[str]]]]:
        """Title, picture ('' for none), headings and rows of each table."""
        parts = (
            ("ladder", "Load ladder", "ladder.png"),
            ("users", "Kinds of clients", ""),
            ("peers", "Beside other servers", "peers.png"),
            ("overload", "Saturation and overload", ""),
        )
        found: list[tuple[str, str, Sequence[str], list[list[str]]]] = []
        for part, title, picture in parts:
            if stages := self.of(part):
                found.append((title, picture, HEADINGS, [row_of(stage) for stage in stages]))
            if part == "users" and (rows := name_rows(self.of(part))):
                found.append(("Kinds of clients, call by call", "", NAME_HEADINGS, rows))
        if self.overload is not None:
            title = f"Overload: {self.overload.offered_images_s:.1f} requests/s offered, "
            title += f"{self.overload.capacity_images_s:.1f} images/s at saturation, "
            title += f"{self.overload.max_queue_jobs} places in the queue"
            found.append((title, "overload.png", OVERLOAD_HEADINGS, overload_rows(self.overload)))
        return found

    def notes(self) -> list[str]:
        """What a reader must know before believing the figures."""
        notes = [f"Failed pictures do not count; {KNEE_SHARE:.0%} of the most images/s is called the knee."]
        if (bend := knee(self.of("ladder"))) is not None:
            notes.append(f"Knee of the ladder: {bend.label}, {bend.images_s:.2f} images/s, p95 {shown(bend.p95_s)} s.")
        if any(stage.cpu_share > MAX_GENERATOR_SHARE for stage in self.stages):
            notes.append(
                f"WARNING: where marked !, the load generator took more than {MAX_GENERATOR_SHARE:.0%} of a core, "
                "which the server may have lacked."
            )
        return notes

    def print(self) -> None:
        for title, _, headings, rows in self.sections():
            print_table(title, headings, rows, self.console)
        for note in self.notes():
            self.console.print(note, highlight=False)

    def write(self, directory: Path) -> None:
        """Write report.md, results.json, stages.csv and the plots."""
        directory.mkdir(parents=True, exist_ok=True)
        overload = self.overload.to_json() if self.overload else None
        results = {**self.about, "stages": [stage.to_json() for stage in self.stages], "overload": overload}
        (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        with (directory / "stages.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("part", *HEADINGS))
            writer.writerows((stage.part, *row_of(stage)) for stage in self.stages)
        pictures = self.plot(directory)
        text = [f"# Load test of {self.about['commit']}\n", f"{self.about['device']}; `{self.about['command']}`\n"]
        text += [f"{note}\n" for note in self.notes()]
        for title, picture, headings, rows in self.sections():
            text += [f"## {title}\n", markdown(headings, rows)]
            text += [f"![{title}]({picture})\n"] if picture in pictures else []
        (directory / "report.md").write_text("\n".join(text))

    def plot(self, directory: Path) -> set[str]:
        """Draw what there is; returns the names of the files."""
        import matplotlib

        matplotlib.use("agg")
        drawn = set()
        if ladder := self.of("ladder"):
            _plot_ladder(ladder, directory / "ladder.png")
            drawn.add("ladder.png")
        if peers := self.of("peers"):
            _plot_peers(peers, directory / "peers.png")
            drawn.add("peers.png")
        if self.overload is not None and any(visit.told_s for visit in self.visits):
            _plot_overload(self.visits, self.overload.max_queue_jobs, directory / "overload.png")
            drawn.add("overload.png")
        return drawn


def _plot_ladder(stages: Sequence[Stage], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, (rate, latency, rows) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    load = [stage.num_users for stage in stages]
    rate.plot(load, [stage.images_s for stage in stages], "o-")
    if (bend := knee(stages)) is not None:
        rate.axvline(bend.num_users, color="tab:red", linestyle=":", label=f"knee: {bend.num_users} clients")
        rate.legend(loc="lower right")
    rate.set(ylabel="images/s", title="Throughput")
    for name, style in (("p50_s", "o-"), ("p95_s", "s-"), ("p99_s", "^:")):
        known = [(x, getattr(stage, name)) for x, stage in zip(load, stages, strict=True) if stage.images]
        latency.plot(*zip(*known, strict=True), style, label=name.removesuffix("_s")) if known else None
    latency.set(ylabel="seconds", title="Latency")
    latency.legend()
    for name, style in (("rows_per_tick", "o-"), ("padded_rows_per_tick", "s:")):
        known = [
            (x, value) for x, stage in zip(load, stages, strict=True) if (value := getattr(stage, name)) is not None
        ]
        rows.plot(*zip(*known, strict=True), style, label=name.replace("_", " ")) if known else None
    rows.set(ylabel="model rows", title="Rows per tick")
    for axes in (rate, latency, rows):
        axes.set_xscale("log", base=2)
        axes.set_xticks(load, [str(users) for users in load])
        axes.set_xlabel("clients at once")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if rows.get_legend_handles_labels()[0]:
        rows.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_peers(stages: Sequence[Stage], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, (rate, tail) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    loads = list(dict.fromkeys(stage.label for stage in stages))
    servers = list(dict.fromkeys(stage.server for stage in stages))
    width = 0.8 / len(servers)
    for place, server in enumerate(servers):
        of_server = [stage for stage in stages if stage.server == server]
        at = [loads.index(stage.label) + (place - (len(servers) - 1) / 2) * width for stage in of_server]
        for axes, values, digits in (
            (rate, [stage.images_s for stage in of_server], 1),
            (tail, [stage.p95_s or 0.0 for stage in of_server], 2),
        ):
            axes.bar_label(axes.bar(at, values, width * 0.9, label=server), fmt=f"%.{digits}f", padding=2)
    for axes, title in ((rate, "images/s"), (tail, "p95 latency, seconds")):
        axes.set_xticks(range(len(loads)), loads)
        axes.set_title(title)
        axes.margins(y=0.15)
    rate.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_overload(visits: Sequence[Visit], max_queue_jobs: int, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    begin = min(visit.arrived_at for visit in visits)
    clients = [
        (visit.arrived_at - begin, free - visit.arrived_at, visit.told_s[0], visit.accepted_at - visit.arrived_at)
        for visit, free in zip(visits, free_times(visits, max_queue_jobs), strict=True)
        if visit.told_s and visit.told_s[0] is not None and visit.accepted_at is not None and free is not None
    ]
    if clients:
        arrived, free_after, told, waited = zip(*sorted(clients), strict=True)
        axes.plot(arrived, waited, ".", label="waited until accepted")
        axes.plot(arrived, told, "x", markersize=4, label="told at first, Retry-After")
        axes.plot(arrived, free_after, "-", label="had to wait: its turn came then")
        axes.legend()
    axes.set(xlabel="first arrival, seconds", ylabel="seconds after it", title="Refused clients")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
