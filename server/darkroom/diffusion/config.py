"""Reading checkpoint configs: each helper returns a checked value or refuses the key by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from darkroom.errors import ModelError, shorten

MAX_BLOCKS = 16
MAX_WIDTH = 1 << 20


def refusal(config: Mapping[str, Any], key: str, accepted: str) -> ModelError:
    """The error for a key that cannot be honoured."""
    return ModelError(f"{key} is {shorten(config.get(key))}, supported: {accepted}")


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise `ModelError` unless each key of `fixed` is absent or has one of its values."""
    for key, accepted in fixed.items():
        if config.get(key, accepted[0]) not in accepted:
            raise refusal(config, key, " or ".join(map(repr, accepted)))


def is_whole(value: object, minimum: int, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= limit


def positive_int(
    config: Mapping[str, Any], key: str, default: int | None, *, minimum: int = 1, limit: int = MAX_WIDTH
) -> int:
    """A whole number; null and absence mean the default, and no default means that the key is required."""
    value: Any = config.get(key)
    value = default if value is None else value
    if not is_whole(value, minimum, limit):
        raise refusal(config, key, f"a whole number from {minimum} to {limit}")
    return int(value)


def positive_ints(
    config: Mapping[str, Any],
    key: str,
    default: int | Sequence[int],
    count: int | None = None,
    *,
    limit: int = MAX_WIDTH,
) -> tuple[int, ...]:
    """One whole number for each of `count` blocks, from a list or from one number for all."""
    value: Any = config.get(key)
    value = default if value is None else value
    if count is not None and is_whole(value, 1, limit):
        value = [value] * count
    if (
        not isinstance(value, list | tuple)
        or not 1 <= len(value) <= MAX_BLOCKS
        or (count is not None and len(value) != count)
        or not all(is_whole(entry, 1, limit) for entry in value)
    ):
        raise refusal(config, key, f"{count or f'up to {MAX_BLOCKS}'} whole numbers from 1 to {limit}")
    return tuple(value)


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refusal(config, key, "a finite number")
    return float(value)
