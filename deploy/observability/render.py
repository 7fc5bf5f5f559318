"""The dashboard as one picture, from what a Prometheus has seen; panels without data are left out.

python -m deploy.observability.render --minutes 6 --output docs/dashboard.png
"""

from __future__ import annotations

import argparse
import io
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from deploy.observability.dashboard import COLUMNS, ROWS, Panel, Placed, Row, placed

NUM_POINTS = 120
_LEGEND_CHARS = 56  # that find room below a panel
_INCHES = (0.5, 0.26)  # of one cell of the grid, across and down
_GROUND, _CARD, _TEXT, _FAINT, _GRID = "#111217", "#181b1f", "#d8d9da", "#9a9ca3", "#2c3035"
_COLOURS = (
    "#73bf69",
    "#f2cc0c",
    "#5794f2",
    "#ff9830",
    "#f2495c",
    "#b877d9",
    "#8ab8ff",
    "#96d98d",
    "#ffcb7d",
    "#c15c17",
)
_STATES = {"green": "#73bf69", "yellow": "#f2cc0c", "red": "#f2495c"}


@dataclass(frozen=True)
class Line:
    """One series: its name in the legend, and a value for each point of time, NaN where there is none."""

    name: str
    values: list[float]


class Range:
    """`query_range` of a Prometheus over the last minutes, as Grafana would ask it."""

    def __init__(self, url: str, minutes: float, scrape_s: float) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)
        self.step_s = minutes * 60 / NUM_POINTS
        self.end_s = math.floor(time.time())
        self.start_s = self.end_s - self.step_s * NUM_POINTS
        self._rate_interval = f"{math.ceil(max(4 * scrape_s, self.step_s + scrape_s))}s"
        self._range = f"{round(self.end_s - self.start_s)}s"

    def lines(self, panel: Panel) -> list[Line]:
        """Every series of the panel that has a value. Raises when Prometheus refuses an expression."""
        found = []
        for query in panel.queries:
            expr = query.expr.replace("$__rate_interval", self._rate_interval).replace("$__range", self._range)
            fields = httpx.QueryParams(query=expr, start=self.start_s, end=self.end_s, step=self.step_s)
            reply = self._client.get("/api/v1/query_range", params=fields).raise_for_status().json()
            for series in reply["data"]["result"]:
                values = [math.nan] * (NUM_POINTS + 1)
                for time_s, value in series["values"]:
                    values[round((time_s - self.start_s) / self.step_s)] = float(value)
                if not all(map(math.isnan, values)):
                    found.append(Line(_name(query.legend, series["metric"]), values))
        return sorted(found, key=lambda line: line.name) if len(panel.queries) == 1 else found

    @property
    def minutes(self) -> list[float]:
        """The points of time, in minutes from the first."""
        return [index * self.step_s / 60 for index in range(NUM_POINTS + 1)]


def _name(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)


def shown(value: float, unit: str) -> str:
    """A value as Grafana would print it."""
    if unit == "percentunit":
        return f"{value * 100:.4g} %"
    if unit == "s":
        return "0" if value == 0 else f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "bytes":
        power, name = next((p, name) for p, name in ((3, "GiB"), (2, "MiB"), (0, "B")) if value >= 1024**p or p == 0)
        return f"{value / 1024**power:.3g} {name}"
    if unit in ("watt", "celsius"):
        return f"{value:.3g} {'W' if unit == 'watt' else '°C'}"
    return f"{value / 1000:.3g} k" if value >= 1000 else f"{value:.3g}"


def draw_stat(axes: Axes, panel: Panel, lines: list[Line]) -> None:
    value = next(value for value in reversed(lines[0].values) if not math.isnan(value))
    colour = "green"
    if panel.thresholds is not None:
        warn, bad = panel.thresholds
        sign = 1 if bad > warn else -1
        colour = "red" if value * sign >= bad * sign else "yellow" if value * sign >= warn * sign else "green"
    axes.axis("off")
    axes.text(0.5, 0.42, shown(value, panel.unit), ha="center", va="center", size=21, color=_STATES[colour])


def draw_lines(axes: Axes, panel: Panel, lines: list[Line], minutes: list[float]) -> None:
    colours = [_COLOURS[index % len(_COLOURS)] for index in range(len(lines))]
    if panel.is_stacked:
        filled = [[0.0 if math.isnan(value) else value for value in line.values] for line in lines]
        axes.stackplot(minutes, *filled, colors=colours, alpha=0.75, linewidth=0, labels=[line.name for line in lines])
    else:
        for line, colour in zip(lines, colours, strict=True):
            axes.plot(minutes, line.values, color=colour, linewidth=1.2, label=line.name)
    axes.set_facecolor("none")
    top = axes.get_ylim()[1] if any(value > 0 for line in lines for value in line.values) else 1.0
    if panel.limit is not None:
        axes.axhline(panel.limit, color=_STATES["red"], linewidth=0.8, linestyle="--")
        top = max(top, panel.limit * 1.15)
    axes.set_xlim(minutes[0], minutes[-1])
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, panel.unit)))
    axes.tick_params(colors=_FAINT, labelsize=6.5, length=0)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=max(1, min(len(lines), _LEGEND_CHARS // (max(len(line.name) for line in lines) + 4))),
        fontsize=5.8,
        frameon=False,
        labelcolor=_TEXT,
        handlelength=1,
        handletextpad=0.4,
        columnspacing=1,
        borderpad=0,
    )


def draw(places: list[Placed], lines: dict[Panel, list[Line]], minutes: list[float]) -> Figure:
    """The whole dashboard in its grid."""
    height = max(place.y + place.height for place in places)
    figure = plt.figure(figsize=(COLUMNS * _INCHES[0], height * _INCHES[1]), facecolor=_GROUND)

    def box(place: Placed, left: float, bottom: float, right: float, top: float) -> tuple[float, float, float, float]:
        """Of a place, without margins given in cells, as matplotlib counts: from the bottom, in shares."""
        x, y = place.x + left, height - place.y - place.height + bottom
        return x / COLUMNS, y / height, (place.width - left - right) / COLUMNS, (place.height - top - bottom) / height

    for place in places:
        panel = place.panel
        if panel is None:
            heading = figure.add_axes(box(place, 0.1, 0, 0, 0))
            heading.axis("off")
            heading.text(0, 0.4, f"▾  {place.title}", color=_TEXT, size=12, weight="bold", va="center")
            if place.y == 0:
                span = f"{minutes[-1]:g} minutes to {time.strftime('%d %b %Y %H:%M')}"
                heading.text(0.997, 0.4, span, color=_FAINT, size=8, va="center", ha="right")
            continue
        card = figure.add_axes(box(place, 0.08, 0.1, 0.08, 0.1), facecolor=_CARD)
        card.set(xticks=[], yticks=[])
        for side in card.spines.values():
            side.set_color(_GRID)
        left, bottom, _, tall = box(place, 0.3, 0, 0.3, 0.35)
        figure.text(left, bottom + tall, place.title, color=_TEXT, size=8, weight="bold", va="top")
        if panel.kind == "stat":
            draw_stat(figure.add_axes(box(place, 0.2, 0.1, 0.2, 0.8)), panel, lines[panel])
        else:
            draw_lines(figure.add_axes(box(place, 1.15, 1.9, 0.3, 1.35)), panel, lines[panel], minutes)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--minutes", type=float, default=6, help="how far to look back")
    parser.add_argument("--scrape-s", type=float, default=5, help="its scrape interval")
    parser.add_argument("--output", type=Path, default=Path("docs/dashboard.png"))
    arguments = parser.parse_args()
    window = Range(arguments.prometheus, arguments.minutes, arguments.scrape_s)
    lines = {panel: window.lines(panel) for row in ROWS for panel in row.panels}
    rows = tuple(Row(row.title, tuple(panel for panel in row.panels if lines[panel])) for row in ROWS)
    figure = draw(list(placed(rows)), lines, window.minutes)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, facecolor=_GROUND)
    # A palette is enough for lines and letters, and a third of the size.
    Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(arguments.output, optimize=True)
    print("no data:", ", ".join(panel.title for panel, found in lines.items() if not found) or "none")


if __name__ == "__main__":
    main()
