"""One row a figure, with what is needed to run it again."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = ("date", "commit", "command", "figure", "value", "unit", "device", "versions", "quality", "detail")


class Figure(NamedTuple):
    """One measured number.

    `quality` says how far what was measured is from fp32; `detail` holds what derives from the value, such as TFLOP/s
    and the share of the limit.
    """

    name: str
    value: float
    unit: str
    quality: str = ""
    detail: str = ""


def device_name(kind: str | None = None) -> str:
    """The accelerator, else the processor and its core count; `kind` `cpu` asks for the processor in any case."""
    import torch

    if torch.cuda.is_available() and kind != "cpu":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line for line in lines if line.startswith("flags")), "")
        model += "".join(f" +{flag}" for flag in ("avx512_bf16", "amx_bf16") if flag in flags)
    return f"{model}, {os.cpu_count()} cores"


@functools.cache
def commit() -> str:
    """The commit measured; `+` marks a tree with changes on top of it. `BENCH_COMMIT` names it where git cannot."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent)
        except OSError:
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!*results.csv", ":!*.png")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


@functools.cache
def versions(*packages: str) -> str:
    """`name=version` of torch and `packages`, those that are not installed left out."""
    found = []
    for name in ("torch", *packages):
        try:
            found.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"python={platform.python_version()} " + " ".join(found)


def command_line() -> str:
    arguments = sys.orig_argv
    return shlex.join(["python", *arguments[arguments.index("-m") :]]) if "-m" in arguments else shlex.join(sys.argv)


def record(
    figures: Iterable[Sequence[object]],
    *packages: str,
    path: Path | None = None,
    command: str | None = None,
    device: str | None = None,
) -> None:
    """Append figures, each a `Figure` or its first fields, to results.csv."""
    path = path or RESULTS
    _upgrade(path)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(FIELDS)
        for figure in (Figure(*fields) for fields in figures):  # type: ignore[arg-type]
            writer.writerow(
                (
                    datetime.date.today().isoformat(),
                    commit(),
                    command or command_line(),
                    figure.name,
                    f"{figure.value:.4g}",
                    figure.unit,
                    device or device_name(),
                    versions(*packages),
                    figure.quality,
                    figure.detail,
                )
            )


def _upgrade(path: Path) -> None:
    """Give a file of an earlier release the columns it lacks; its rows keep what they say."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] == list(FIELDS):
        return
    if rows[0] != list(FIELDS[: len(rows[0])]):
        raise ValueError(f"{path}: expected the columns {', '.join(FIELDS)}, got {', '.join(rows[0])}")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows([*row, *[""] * (len(FIELDS) - len(row))] for row in rows[1:])
