"""What an evaluation writes: shares with their intervals, tables, plots and contact sheets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.contact_sheet import wrapped

Z_95 = 1.959964
TILE_PX = 128
RIGHT, WRONG = (40, 160, 80), (214, 40, 40)


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    passed: int
    total: int

    @property
    def value(self) -> float:
        return self.passed / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval. Source: Wilson 1927."""
        if not self.total:
            return 0.0, 1.0
        spread = Z_95**2 / self.total
        centre = (self.value + spread / 2) / (1 + spread)
        half = math.sqrt(self.value * (1 - self.value) * spread + spread**2 / 4) / (1 + spread)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f}, {self.passed} of {self.total})"

    def __add__(self, other: Share) -> Share:
        return Share(self.passed + other.passed, self.total + other.total)

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"passed": self.passed, "total": self.total, "share": self.value, "low": low, "high": high}


def share_of(passes: Sequence[bool]) -> Share:
    return Share(sum(passes), len(passes))


def difference(better: Share, worse: Share) -> tuple[float, float, float]:
    """The first share less the second, and the 95 % interval of that for two independent samples. Source: Newcombe
    1998, method 10."""
    (low, high), (other_low, other_high) = better.interval, worse.interval
    apart = better.value - worse.value
    below = math.hypot(better.value - low, other_high - worse.value)
    above = math.hypot(high - better.value, worse.value - other_low)
    return apart, apart - below, apart + above


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def category_table(shares: Mapping[tuple[str, str], Share], combinations: Mapping[tuple[str, str], int]) -> str:
    """Shares by category and split, with how many different things each asks for."""
    rows = [
        (name, *(_of_combinations((name, split), shares, combinations) for split in ("trained", "held_out")))
        for name in dict.fromkeys(category for category, _ in shares)
    ]
    return table(("category", "trained combinations", "held-out combinations"), rows)


def _of_combinations(
    key: tuple[str, str], shares: Mapping[tuple[str, str], Share], combinations: Mapping[tuple[str, str], int]
) -> str:
    return f"{shares[key]}; {combinations[key]} combinations" if key in shares else "-"


def plot_curves(path: Path, curves: dict[str, Sequence[tuple[float, Share]]], x_label: str, title: str) -> None:
    """Shares against a number, a line with its intervals for each name, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, points in curves.items():
        x = [place for place, _ in points]
        y = np.array([100 * share.value for _, share in points])
        bounds = np.array([[100 * bound for bound in share.interval] for _, share in points])
        # At all of so many the bound may lie below by what rounding takes.
        errors = np.maximum(0, [y - bounds[:, 0], bounds[:, 1] - y])
        axes.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=name)
    axes.set(xlabel=x_label, ylabel="prompts drawn as asked, %", title=title, ylim=(0, 101))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def save_sheet(path: Path, pictures: Sequence[np.ndarray], captions: Sequence[str], passes: Sequence[bool]) -> None:
    """Pictures `[H, W, 3]` uint8, ten a row, each in a frame that says whether it passed and over its caption."""
    columns, lines, line_px = 10, 4, 11
    width, height = TILE_PX + 8, TILE_PX + 8 + lines * line_px
    sheet = Image.new(
        "RGB", (min(columns, len(pictures)) * width, math.ceil(len(pictures) / columns) * height), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for index, (picture, caption, is_right) in enumerate(zip(pictures, captions, passes, strict=True)):
        left, top = index % columns * width, index // columns * height
        draw.rectangle((left + 1, top + 1, left + TILE_PX + 6, top + TILE_PX + 6), RIGHT if is_right else WRONG)
        sheet.paste(Image.fromarray(picture), (left + 4, top + 4))
        for number, line in enumerate(wrapped(caption, font, TILE_PX)[:lines]):
            draw.text((left + 3, top + TILE_PX + 7 + number * line_px), line, "black", font)
    sheet.save(path)
