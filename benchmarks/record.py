"""One row a figure, with what is needed to run it again."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = ("date", "commit", "command", "figure", "value", "unit", "device", "versions")


def device_name() -> str:
    """The accelerator, else the processor and its core count."""
    import os

    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line for line in lines if line.startswith("flags")), "")
        model += "".join(f" +{flag}" for flag in ("avx512_bf16", "amx_bf16") if flag in flags)
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit measured; `+` marks a tree with changes on top of it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!*results.csv")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def versions(*packages: str) -> str:
    return " ".join(f"{name}={importlib.metadata.version(name)}" for name in packages)


def record(figures: list[tuple[str, float, str]], *packages: str) -> None:
    """Append (figure, value, unit) rows to results.csv."""
    command = shlex.join(["python", "-m", *sys.orig_argv[sys.orig_argv.index("-m") + 1 :]])
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(FIELDS)
        for figure, value, unit in figures:
            writer.writerow(
                (
                    datetime.date.today().isoformat(),
                    commit(),
                    command,
                    figure,
                    f"{value:.4g}",
                    unit,
                    device_name(),
                    f"python={platform.python_version()} " + versions("torch", *packages),
                )
            )
