"""Reads the metrics of this process as Prometheus would."""

from __future__ import annotations

from darkroom import metrics
from prometheus_client.parser import text_string_to_metric_families


class Change:
    """What the metrics gained since this was made; gauges read as they are."""

    def __init__(self) -> None:
        self._before = self._read()

    def _read(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        text = metrics.exposition()[0].decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The change of all series of `darkroom_<name>` that carry `labels`, added up."""

        wanted = set(labels.items())

        def total(samples: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> float:
            series = ((labels_, value) for (name_, labels_), value in samples.items() if name_ == f"darkroom_{name}")
            return sum(value for labels_, value in series if wanted <= labels_)

        return total(self._read()) - total(self._before)


def value(name: str, **labels: str) -> float | None:
    return metrics.REGISTRY.get_sample_value(f"darkroom_{name}", labels)
