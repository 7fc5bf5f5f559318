"""What the workers' own metrics say of a stretch of time: the difference of two looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families


class Ticks(NamedTuple):
    """Sums over all workers since they started. Subtract two for what happened between them."""

    ticks: float
    rows: float
    padded_rows: float
    images: float

    def since(self, earlier: Ticks) -> Ticks:
        return Ticks(*(now - then for now, then in zip(self, earlier, strict=True)))

    @property
    def rows_per_tick(self) -> float | None:
        """Model rows in a mean UNet call, padding left out; None when there was no call."""
        return self.rows / self.ticks if self.ticks else None

    @property
    def padded_rows_per_tick(self) -> float | None:
        """Model rows of a mean UNet call that only fill its shape; None when there was no call."""
        return self.padded_rows / self.ticks if self.ticks else None


def read_ticks(texts: Sequence[str]) -> Ticks:
    """Add up the exposition `texts` of several workers."""
    found = {
        "darkroom_tick_rows_count": 0.0,
        "darkroom_tick_rows_sum": 0.0,
        "darkroom_padded_rows_total": 0.0,
        "darkroom_images_total": 0.0,
    }
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in found:
                    found[sample.name] += sample.value
    return Ticks(*found.values())


def scrape(urls: Sequence[str]) -> Ticks | None:
    """Read the workers' metrics at `urls`; None when none is known."""
    if not urls:
        return None
    texts = []
    for url in urls:
        with urlopen(url, timeout=10) as reply:
            texts.append(reply.read().decode())
    return read_ticks(texts)
