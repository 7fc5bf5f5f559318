"""What this server's operator does not want drawn: words and patterns of a file, and a function of their own."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from darkroom.config import Settings, load_hook
from darkroom.errors import ConfigError, PromptRefused

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
_WORD = re.compile(r"\w+")


class PromptRules:
    """Raises `ConfigError` for a file or function that cannot be used."""

    def __init__(self, settings: Settings) -> None:
        self._phrases: list[str] = []
        self._patterns: list[re.Pattern[str]] = []
        if settings.prompt_denylist is not None:
            self._read(settings.prompt_denylist)
        self._hook: Callable[[str], bool] | None = None
        if settings.prompt_hook is not None:
            self._hook = load_hook("DARKROOM_PROMPT_HOOK", settings.prompt_hook)

    async def check(self, prompt: str) -> None:
        """Raises `PromptRefused`, which says neither what was written nor which rule it met."""
        if not (self._phrases or self._patterns or self._hook):
            return
        # In a thread: patterns and functions are somebody's own, and may take their time.
        if not await asyncio.to_thread(self._allows, prompt):
            raise PromptRefused("prompt: this server does not draw that")

    def _allows(self, prompt: str) -> bool:
        text = _plain(prompt)
        words = f" {' '.join(_WORD.findall(text))} "
        if any(phrase in words for phrase in self._phrases) or any(one.search(text) for one in self._patterns):
            return False
        return self._hook is None or bool(self._hook(prompt))

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"DARKROOM_PROMPT_DENYLIST={path}: {error}") from error
        for number, line in enumerate(lines, 1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            if len(entry) > 2 and entry.startswith("/") and entry.endswith("/"):
                try:
                    self._patterns.append(re.compile(entry[1:-1], re.IGNORECASE))
                except re.error as error:
                    raise ConfigError(f"DARKROOM_PROMPT_DENYLIST={path}: line {number}: {error}") from error
                continue
            words = _WORD.findall(_plain(entry))
            if not words:
                raise ConfigError(f"DARKROOM_PROMPT_DENYLIST={path}: line {number} has no word in it")
            self._phrases.append(f" {' '.join(words)} ")


def _plain(text: str) -> str:
    """As a reader sees it: compatibility forms and cases made one, invisible characters left out."""
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
