"""What the README states of the code is compared with the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from darkroom.api.app import create_app
from darkroom.config import Settings
from darkroom.sampling import SAMPLERS, sampler_info

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def shown(value: Any) -> str:
    """A default as the table shows it."""
    if value is None:
        return "unset"
    if isinstance(value, Path):
        return f"`{value}`".replace(str(Path.home()), "~")
    return f"`{int(value)}`" if isinstance(value, float) and value.is_integer() else f"`{value}`"


def settings_rows() -> list[str]:
    return [
        f"| `DARKROOM_{name.upper()}` | {shown(field.get_default(call_default_factory=True))} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]


def sampler_rows() -> list[str]:
    return [
        f"| `{name}` | {', '.join(sampler_info(name).sigma_schedules)} | {sampler_info(name).description} |"
        for name in SAMPLERS
    ]


def table_under(heading: str, document: str = README) -> list[str]:
    """The rows of the first table after a heading, without its head."""
    section = document.split(f"# {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def test_every_setting_is_listed_with_its_default_and_meaning() -> None:
    assert table_under("Settings", (ROOT / "docs" / "settings.md").read_text()) == settings_rows()


def test_every_sampler_is_listed() -> None:
    assert table_under("Samplers") == sampler_rows()


def test_every_endpoint_is_listed() -> None:
    paths = create_app(Settings(redis_url="redis://127.0.0.1:1")).openapi()["paths"]
    calls = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    listed = {row.split("`")[1] for row in table_under("Endpoints")}
    webui = {call for call in calls if " /sdapi/v1/" in call}
    openai = {call for call in calls if " /v1/" in call}
    assert calls - webui - openai <= listed
    guide = (ROOT / "docs" / "sdapi.md").read_text()
    assert not [call for call in webui if f"`{call.rpartition('/')[2]}`" not in guide]
    guide = (ROOT / "docs" / "openai.md").read_text()
    assert not [call for call in openai if f"`{call.partition(' ')[2]}`" not in guide]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:server|kernels|tests|training|benchmarks|docs)/[\w./-]*)`", text)
    shown_or_linked = re.findall(r"\]\(((?!https?:)[^)#\s]+)", text)
    for name in named + shown_or_linked:
        assert (ROOT / name).exists(), f"{document} names {name}"
