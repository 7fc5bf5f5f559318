"""Prompts with weights, as AUTOMATIC1111 writes them: `(word)`, `(word:1.3)`, `[word]`, `BREAK`. Plain Python, so that
the API can read them as well as the text encoder.

Source: AUTOMATIC1111/stable-diffusion-webui modules/prompt_parser.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

BRACKET_WEIGHT = 1.1
# Far beyond what leaves a picture; without it a thousand brackets would be infinity.
MAX_WEIGHT = 100.0

_TOKENS = re.compile(
    r"""
      \\(?P<escaped>[()\[\]\\])
    | :\s*(?P<weight>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)
    | (?P<bracket>[()\[\]])
    | \b(?P<break>BREAK)\b
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Piece:
    """Text and its weight; `text` None is a `BREAK`."""

    text: str | None
    weight: float = 1.0


class _Brackets:
    """Brackets of one kind: what each weighs, and where it begins and ends, by the number of the text."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._ranges: list[tuple[int, int, float]] = []
        self._open: list[int] = []

    def open(self, at: int) -> None:
        self._open.append(len(self._ranges))
        self._ranges.append((at, -1, self._weight))

    def close(self, at: int, weight: float | None = None) -> bool:
        """Close the innermost; False when none is open."""
        if not self._open:
            return False
        index = self._open.pop()
        self._ranges[index] = self._ranges[index][0], at, self._weight if weight is None else weight
        return True

    def weights(self, num_texts: int) -> list[float]:
        """The weight of each text. What was never closed reaches to the end."""
        found, inside, coming = list[float](), list[tuple[int, float]](), 0
        for at in range(num_texts):
            while inside and inside[-1][0] <= at:
                inside.pop()
            while coming < len(self._ranges) and self._ranges[coming][0] <= at:
                _, end, weight = self._ranges[coming]
                end = num_texts if end < 0 else end
                if end > at:
                    inside.append((end, _limited(weight * (inside[-1][1] if inside else 1.0))))
                coming += 1
            found.append(inside[-1][1] if inside else 1.0)
        return found


def _limited(weight: float) -> float:
    return max(-MAX_WEIGHT, min(weight, MAX_WEIGHT))


def parse(prompt: str) -> list[Piece]:
    """Read a prompt's brackets. Any string at all is a prompt; neighbours of one weight are one piece.

    A bracket that is never closed reaches to the end; one that was never opened is text, and so is a character after a
    backslash. Weights multiply where brackets are nested, and are within ±`MAX_WEIGHT`.
    """
    texts: list[str | None] = []
    round_, square = _Brackets(BRACKET_WEIGHT), _Brackets(1 / BRACKET_WEIGHT)
    position = 0
    for match in _TOKENS.finditer(prompt):
        before = prompt[position : match.start()]
        if before:
            texts.append(before.rstrip() if match["break"] else before)
        position = match.end()
        bracket, weight = match["bracket"], match["weight"]
        if match["break"]:
            texts.append(None)
            while prompt[position : position + 1].isspace():
                position += 1
        elif bracket == "(":
            round_.open(len(texts))
        elif bracket == "[":
            square.open(len(texts))
        elif not (
            (weight is not None and round_.close(len(texts), float(weight)))
            or (bracket == ")" and round_.close(len(texts)))
            or (bracket == "]" and square.close(len(texts)))
        ):
            # Nothing was open.
            texts.append(match["escaped"] or match[0])
    if position < len(prompt):
        texts.append(prompt[position:])

    weights = zip(round_.weights(len(texts)), square.weights(len(texts)), strict=True)
    weighed = [Piece(text, _limited(a * b)) for text, (a, b) in zip(texts, weights, strict=True) if text != ""]
    pieces: list[Piece] = []
    for _, group in groupby(weighed, key=lambda piece: (piece.text is None, piece.weight)):
        same = list(group)
        if same[0].text is None:
            pieces += same
        else:
            pieces.append(Piece("".join(map(attrgetter("text"), same)), same[0].weight))
    return pieces


def text_of(prompt: str) -> str:
    """What a prompt with weights says, without its brackets."""
    return "".join(" " if piece.text is None else piece.text for piece in parse(prompt))
