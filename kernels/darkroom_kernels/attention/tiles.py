"""Which tile a kernel takes: rows of `tuned.json`, and how that file is written from measurements."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from darkroom_kernels.devices import device_kinds

TABLE = Path(__file__).with_name("tuned.json")
# Keys and values of a head that few_keys holds on the chip: two programs of them fit a multiprocessor of every class.
MAX_FEW_KEYS = 160
MAX_HELD_BYTES = 56 << 10


@dataclass(frozen=True)
class Tile:
    """How much one program of a kernel does. `kernel`: `flash` or `few_keys`; `block_m` queries at a time, `block_n`
    keys at a time (flash) or 0; `tiles_per_program` tiles of queries one after the other (few_keys, at most)."""

    kernel: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tiles_per_program: int = 1


@dataclass(frozen=True)
class Row:
    """A line of the table: the tile for all sizes up to its bounds; None: no bound.

    `bits`: 16 for fp16 and bf16, 32 for fp32. `winner`: the implementation that was fastest there, and `times_us` what
    each took, once `measured`. A measured row speaks for its own head size alone, and for either few keys or many:
    elsewhere other kernels compete.
    """

    max_head_dim: int
    max_keys: int | None
    max_queries: int | None
    tile: Tile
    bits: int = 16
    measured: bool = False
    winner: str | None = None
    times_us: dict[str, float] = field(default_factory=dict)

    @property
    def has_few_keys(self) -> bool:
        return self.max_keys is not None and self.max_keys <= MAX_FEW_KEYS

    def holds(self, bits: int, head_dim: int, num_queries: int, num_keys: int) -> bool:
        if self.measured and (head_dim != self.max_head_dim or self.has_few_keys != (num_keys <= MAX_FEW_KEYS)):
            return False
        return (
            self.bits == bits
            and head_dim <= self.max_head_dim
            and (self.max_keys is None or num_keys <= self.max_keys)
            and (self.max_queries is None or num_queries <= self.max_queries)
        )


def split(size: int) -> tuple[int, int]:
    """Two powers of two, the second 0 or at least 16, that hold `size` with less waste than one: 40 = 32 + 16 (8 of
    them masked), 80 = 64 + 16, 160 = 128 + 32, 77 = 64 + 16 (3 masked)."""
    whole = max(16, 1 << (size - 1).bit_length())
    first = whole // 2
    second = max(16, 1 << (max(size - first, 1) - 1).bit_length())
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


def fits_few_keys(bits: int, head_dim: int, num_keys: int) -> bool:
    """Whether `few_keys` can hold all keys and values of a head."""
    held = sum(split(num_keys)) * sum(split(head_dim)) * 2 * bits // 8
    return bits == 16 and sum(split(num_keys)) <= MAX_FEW_KEYS and held <= MAX_HELD_BYTES


@functools.cache
def load_table(path: Path = TABLE) -> dict[str, list[Row]]:
    """Rows of each device kind; of several rows that hold a size, the first counts."""
    kinds: dict[str, list[dict[str, object]]] = json.loads(path.read_text())
    return {
        kind: [Row(**{**row, "tile": Tile(**row["tile"])}) for row in rows]  # type: ignore[arg-type]
        for kind, rows in kinds.items()
    }


@functools.lru_cache(maxsize=4096)
def row_for(device: torch.device, bits: int, head_dim: int, num_queries: int, num_keys: int) -> Row:
    """The row of the table for these sizes on this device; its few_keys tile only where all keys fit."""
    table = load_table()
    for kind in device_kinds(device):
        for row in table.get(kind, ()):
            if row.holds(bits, head_dim, num_queries, num_keys) and (
                row.tile.kernel == "flash" or fits_few_keys(bits, head_dim, num_keys)
            ):
                return row
    raise LookupError(f"no tile for head size {head_dim}, {num_queries} queries and {num_keys} keys of {bits} bits")


def candidate_tiles(bits: int, head_dim: int, num_queries: int, num_keys: int) -> list[Tile]:
    """Tiles worth measuring at one size. Some may not fit a device: a launch then raises, and the next is tried."""
    if bits == 32:
        return [Tile("flash", m, n, w, 1) for m, n, w in ((128, 32, 8), (64, 32, 4), (32, 32, 4), (16, 16, 8))]
    widths = (128, 64, 32) if head_dim <= 128 else (64, 32)
    tiles = [
        Tile("flash", block_m, block_n, num_warps, num_stages)
        for block_m, num_warps in ((128, 4), (128, 8), (64, 4))
        for block_n in widths
        for num_stages in (2, 3, 4)
        if num_queries >= block_m or block_m == 64
    ]
    if fits_few_keys(bits, head_dim, num_keys):
        tiles += [
            Tile("few_keys", block_m, 0, num_warps, num_stages, tiles_per_program)
            for block_m, num_warps in ((64, 4), (128, 4), (128, 8))
            for num_stages in (1, 2, 3)
            for tiles_per_program in (1, 2, 4, 8)
            if tiles_per_program * block_m <= max(num_queries, 64)
        ]
    return tiles


def measured_row(
    bits: int, head_dim: int, num_queries: int, num_keys: int, tile: Tile, times_us: dict[str, float]
) -> Row:
    """A row for one measured size. `times_us`: microseconds of each implementation, `triton` being that of `tile`.

    Of few keys it holds for all that need the same blocks.
    """
    return Row(
        max_head_dim=head_dim,
        max_keys=sum(split(num_keys)) if num_keys <= MAX_FEW_KEYS else num_keys,
        max_queries=num_queries,
        tile=tile,
        bits=bits,
        measured=True,
        winner=min(times_us, key=lambda name: times_us[name]),
        times_us={name: round(time, 2) for name, time in sorted(times_us.items())},
    )


def save_table(kind: str, rows: Iterable[Row], path: Path = TABLE) -> None:
    """Put measured rows in the place of those that one device kind, the first of `device_kinds`, has for the same head
    sizes at few keys or at many; its other rows and other kinds' stay.

    Rows are put in order of size, so that a size between two measured ones takes the next larger's tile. The most
    queries measured at a number of keys hold without bound, and so do the most keys of a head size when they are many.
    """
    ordered = sorted(rows, key=_order)
    most_queries = {(row.bits, row.max_head_dim, row.max_keys): row for row in ordered}
    most_keys = {(row.bits, row.max_head_dim): row.max_keys for row in ordered if not row.has_few_keys}
    measured = [
        replace(
            row,
            max_keys=None if row.max_keys == most_keys.get((row.bits, row.max_head_dim)) else row.max_keys,
            max_queries=None if row is most_queries[row.bits, row.max_head_dim, row.max_keys] else row.max_queries,
        )
        for row in ordered
    ]
    table = load_table(path)
    replaced = {(row.bits, row.max_head_dim, row.has_few_keys) for row in measured}
    kept = [row for row in table.get(kind, ()) if (row.bits, row.max_head_dim, row.has_few_keys) not in replaced]
    write_table({**table, kind: sorted([*kept, *measured], key=_order)}, path)


def _order(row: Row) -> tuple[int, int, float, float]:
    infinity = float("inf")
    return row.bits, row.max_head_dim, row.max_keys or infinity, row.max_queries or infinity


def write_table(table: dict[str, list[Row]], path: Path = TABLE) -> None:
    """One row a line, so that a change of one is seen as one."""
    kinds = []
    for kind, rows in table.items():
        lines = ",\n".join(f"    {json.dumps(asdict(row))}" for row in rows)
        kinds.append(f"  {json.dumps(kind)}: [\n{lines}\n  ]")
    path.write_text("{\n" + ",\n".join(kinds) + "\n}\n")
    load_table.cache_clear()
    row_for.cache_clear()
