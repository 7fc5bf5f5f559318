"""Which implementation of a kernel was fastest, by device and size: `winners.json`, written by `--tune`.

Attention has a table of its own, because its tiles are measured too.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from darkroom_kernels.devices import device_kinds

TABLE = Path(__file__).with_name("winners.json")


@dataclass(frozen=True)
class Row:
    """Microseconds of each implementation at one size. What a size counts is said by each kernel's `api.py`; it is of
    one row of a batch, so that a row is computed alike alone and in any batch."""

    size: int
    times_us: dict[str, float]

    @property
    def winner(self) -> str:
        return min(self.times_us, key=lambda name: self.times_us[name])


@functools.cache
def load_winners(path: Path = TABLE) -> dict[str, dict[str, list[Row]]]:
    """Rows in order of size, by product and class of a device, then by kernel."""
    kinds: dict[str, dict[str, list[dict[str, object]]]] = json.loads(path.read_text())
    return {
        kind: {kernel: [Row(**row) for row in rows] for kernel, rows in kernels.items()}  # type: ignore[arg-type]
        for kind, kernels in kinds.items()
    }


@functools.lru_cache(maxsize=8192)
def winner_for(kernel: str, device: torch.device, size: int) -> str | None:
    """The fastest implementation of the measured size nearest above, or of the largest; None where none is measured."""
    if device.type != "cuda":
        return None
    rows = load_winners().get(device_kinds(device)[0], {}).get(kernel, [])
    row = next((row for row in rows if row.size >= size), rows[-1] if rows else None)
    return None if row is None else row.winner


def winners_of(kernel: str, device: torch.device) -> set[str]:
    """Every implementation that was the fastest at some size on this device."""
    if device.type != "cuda":
        return set()
    return {row.winner for row in load_winners().get(device_kinds(device)[0], {}).get(kernel, [])}


def save_winners(kind: str, kernel: str, rows: list[Row], path: Path = TABLE) -> None:
    """Put `rows` in the place of those that a device kind has for a kernel."""
    table = {name: dict(kernels) for name, kernels in load_winners(path).items()}
    table.setdefault(kind, {})[kernel] = sorted(rows, key=lambda row: row.size)
    kinds = []
    for name, kernels in table.items():
        # One row a line, so that a change of one is seen as one.
        parts = [
            f"    {json.dumps(own)}: [\n" + ",\n".join(f"      {json.dumps(asdict(row))}" for row in some) + "\n    ]"
            for own, some in kernels.items()
        ]
        kinds.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n  }")
    path.write_text("{\n" + ",\n".join(kinds) + "\n}\n")
    load_winners.cache_clear()
    winner_for.cache_clear()
