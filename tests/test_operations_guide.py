"""What the guides for operators name must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from darkroom import metrics
from darkroom.config import Settings
from darkroom.errors import HTTP_STATUS

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "docs" / "operations.md", ROOT / "deploy" / "kubernetes" / "README.md"]


@pytest.mark.parametrize("guide", [*GUIDES, ROOT / "docs" / "durability.md"], ids=lambda path: path.name)
def test_settings_and_metrics_exist(guide: Path) -> None:
    text = guide.read_text()
    assert set(re.findall(r"\bDARKROOM_\w+", text)) <= {f"DARKROOM_{name.upper()}" for name in Settings.model_fields}
    families = list(metrics.REGISTRY.collect())
    exported = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert set(re.findall(r"\b(?:darkroom|process)_\w+", text)) <= exported


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_files_exist(guide: Path) -> None:
    named = set(re.findall(r"`((?:docs|deploy|overlays|components|base)/[\w./-]+)`", guide.read_text()))
    assert named
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "deploy" / "kubernetes" / path).exists(), path


def test_the_error_codes_of_the_alerts_exist() -> None:
    alerts = GUIDES[0].read_text().split("\n## What each alert means")[1]
    for code in (
        "queue_unavailable",
        "no_model",
        "storage_full",
        "out_of_memory",
        "internal",
        "queue_full",
        "dead_letter",
    ):
        assert f"`{code}`" in alerts
        assert code in HTTP_STATUS
