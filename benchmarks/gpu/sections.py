"""Sections are lists of items; each item is measured once, kept in a file, and never measured twice.

So a run that is killed, or stopped at its time limit, goes on where it was when the same command is given again. An
item in which the process died twice is given up.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from darkroom.engine.device import is_device_lost

from benchmarks.record import Figure, record

MAX_STARTS = 2
PACKAGES = ("triton", "diffusers", "xformers", "flash-attn")


class DeviceBroken(RuntimeError):
    """The device answers nothing more in this process; a new one may go on."""


class NotYet(RuntimeError):
    """An item needs another one that is not measured; it stays to be measured."""


@dataclass
class Measured:
    """What an item found: figures for results.csv, and what its section's report needs, as JSON values."""

    figures: list[Figure] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One thing to measure; `expected_s` is a guess, so that it is not begun just before the time limit."""

    name: str
    measure: Callable[[], Measured]
    expected_s: float = 5.0


class Section(Protocol):
    name: str

    def items(self) -> Iterable[Item]: ...

    def resume(self, found: dict[str, dict[str, Any]]) -> None:
        """Take over what an earlier run of the same state measured."""
        ...

    def report(self, found: dict[str, dict[str, Any]], reasons: dict[str, str]) -> str:
        """The printed table. `found` is the data of the items that were measured, `reasons` why others were not."""
        ...


class State:
    """The items of all sections, in a JSON file that is rewritten after every change.

    `identity` says what was measured (commit, device, versions, form); a file of another identity is not continued.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.path, self.identity = path, identity
        self.items: dict[str, dict[str, dict[str, Any]]] = {}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored.get("identity") == identity:
                self.items = stored["items"]

    def entry(self, section: str, item: str) -> dict[str, Any]:
        return self.items.setdefault(section, {}).setdefault(item, {"status": "new", "starts": 0})

    def found(self, section: str) -> dict[str, dict[str, Any]]:
        """The data of a section's items that were measured."""
        items = self.items.get(section, {})
        return {name: entry["data"] for name, entry in items.items() if entry["status"] == "done"}

    def forget(self, sections: Iterable[str]) -> None:
        for section in sections:
            self.items.pop(section, None)
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"identity": self.identity, "items": self.items}, indent=1))
        os.replace(scratch, self.path)


def run_section(
    section: Section,
    state: State,
    *,
    time_limit_s: float,
    only: Collection[str] = (),
    results: Path | None = None,
    command: str | None = None,
    device: str | None = None,
    is_quick: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Measure what is not yet measured. Returns whether all of the section is, within the time limit.

    `results` is the csv that gets each item's figures at once; None records nothing. `only` picks items by parts of
    their names, in which `*` stands for any text; none picks all. With `is_quick` items are begun until the limit is
    over, whatever they are expected to take. Raises `DeviceBroken` when this process can measure nothing more.
    """
    began = time.monotonic()
    section.resume(state.found(section.name))
    is_first, is_complete = True, True
    for item in section.items():
        if only and not any(fnmatchcase(item.name, f"*{text}*") for text in only):
            continue
        entry = state.entry(section.name, item.name)
        if entry["status"] in ("done", "failed"):
            continue
        left_s = time_limit_s - (time.monotonic() - began)
        if left_s <= 0 or (not is_first and not is_quick and item.expected_s > left_s):
            say(f"{section.name}: stopped before {item.name!r}, {max(left_s, 0):.0f} s were left; run again to go on")
            return False
        is_first = False
        if entry["starts"] >= MAX_STARTS:
            entry.update(status="failed", reason="the process died in it twice")
            state.save()
            continue
        entry["starts"] += 1
        entry["status"] = "running"
        state.save()
        started = time.monotonic()
        try:
            measured = item.measure()
        except NotYet as error:
            entry.update(status="new", starts=0)
            state.save()
            say(f"{section.name}: {item.name}: not yet: {error}")
            is_complete = False
            continue
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            entry.update(status="failed", reason=reason)
            state.save()
            say(f"{section.name}: {item.name}: not measured: {reason}")
            if is_device_lost(error) or is_device_lost(error.__cause__ or error):
                raise DeviceBroken(reason) from error
            if os.environ.get("BENCH_TRACEBACK"):
                traceback.print_exc()
            continue
        if results is not None:
            record(measured.figures, *PACKAGES, path=results, command=command, device=device)
        entry.update(status="done", data=measured.data, figures=[list(figure) for figure in measured.figures])
        state.save()
        say(f"{section.name}: {item.name} ({time.monotonic() - started:.1f} s)")
    return is_complete


def report(section: Section, state: State) -> str:
    """The section's table over everything measured so far."""
    items = state.items.get(section.name, {})
    reasons = {name: entry["reason"] for name, entry in items.items() if entry["status"] == "failed"}
    lines = [f"\n== {section.name}", section.report(state.found(section.name), reasons)]
    lines += [f"not measured: {name}: {reason}" for name, reason in reasons.items()]
    return "\n".join(lines)


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell; the first row is the head, numbers stand right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 or not _is_number(rows[-1][index]) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "-≥"
