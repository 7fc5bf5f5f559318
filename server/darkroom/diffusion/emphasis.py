"""Prompts with weights, as AUTOMATIC1111 means them: `(word)`, `(word:1.3)`, `[word]`, `BREAK`, and any length.

A prompt is read as pieces of text with a weight each, its tokens are cut into chunks that the text encoder can take,
and what the encoder makes of a token is multiplied by its weight. Source: AUTOMATIC1111/stable-diffusion-webui
modules/prompt_parser.py (the grammar), modules/sd_hijack_clip.py (the chunks), modules/sd_emphasis.py ("Original").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

BRACKET_WEIGHT = 1.1
# Far beyond what leaves a picture; without it a thousand brackets would be infinity.
MAX_WEIGHT = 100.0
# A chunk that is full goes on in the next one after its last comma, if that is at most so many tokens back.
COMMA_REACH = 20

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


def parse(prompt: str) -> list[Piece]:
    """Read a prompt's brackets. Any string at all is a prompt; neighbours of one weight are one piece.

    A bracket that is never closed reaches to the end; one that was never opened is text, and so is a character after a
    backslash. Weights multiply where brackets are nested, and are within ±`MAX_WEIGHT`.
    """
    texts: list[str | None] = []
    # Numbers in one array, because a bracket may weigh thousands of pieces, and there may be thousands of brackets.
    weights = np.ones(2 * len(prompt) + 1)
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(start: int, weight: float) -> None:
        inside = weights[start : len(texts)]
        np.clip(inside * weight, -MAX_WEIGHT, MAX_WEIGHT, out=inside)

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
        elif bracket is not None and bracket in opened:
            opened[bracket].append(len(texts))
        elif weight is not None and opened["("]:
            close(opened["("].pop(), max(-MAX_WEIGHT, min(float(weight), MAX_WEIGHT)))
        elif bracket == ")" and opened["("]:
            close(opened["("].pop(), BRACKET_WEIGHT)
        elif bracket == "]" and opened["["]:
            close(opened["["].pop(), 1 / BRACKET_WEIGHT)
        else:
            texts.append(match["escaped"] or match[0])
    if position < len(prompt):
        texts.append(prompt[position:])
    for start in opened["("]:
        close(start, BRACKET_WEIGHT)
    for start in opened["["]:
        close(start, 1 / BRACKET_WEIGHT)

    weighed = [(text is None, text, float(weight)) for text, weight in zip(texts, weights, strict=False)]
    pieces: list[Piece] = []
    for (is_break, weight), group in groupby(weighed, key=itemgetter(0, 2)):
        if is_break:
            pieces += [Piece(None) for _ in group]
        else:
            pieces.append(Piece("".join(text for _, text, _ in group if text is not None), weight))
    return pieces


@dataclass
class Chunk:
    """Tokens that the text encoder takes in one go, without those of its start, end and padding."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1.0 for weight in self.weights)


def chunked(
    pieces: Sequence[Piece], tokenize: Callable[[list[str]], list[list[int]]], length: int, comma: int | None
) -> list[Chunk]:
    """Cut a prompt into chunks of at most `length` tokens, at least one.

    `tokenize` gives the tokens of texts, without those of a start and an end. `comma` is the token of a comma at a
    word's end: a chunk rather ends after one than in the middle of a phrase.
    """
    tokens_of = iter(tokenize([piece.text for piece in pieces if piece.text is not None]))
    chunks, chunk, last_comma = list[Chunk](), Chunk(), -1
    for piece in pieces:
        if piece.text is None:
            chunks.append(chunk)
            chunk, last_comma = Chunk(), -1
            continue
        for token in next(tokens_of):
            if len(chunk.tokens) == length:
                # A comma may still be followed by the next phrase, so it begins the next chunk if it has to.
                cut = length
                if token != comma and last_comma >= 0 and length - last_comma <= COMMA_REACH:
                    cut = last_comma + 1
                chunks.append(Chunk(chunk.tokens[:cut], chunk.weights[:cut]))
                chunk, last_comma = Chunk(chunk.tokens[cut:], chunk.weights[cut:]), -1
            if token == comma:
                last_comma = len(chunk.tokens)
            chunk.tokens.append(token)
            chunk.weights.append(piece.weight)
    return [*chunks, chunk] if chunk.tokens or not chunks else chunks


def emphasise(embeds: Tensor, weights: Tensor) -> Tensor:
    """Multiply each token's embedding by its weight, and bring each chunk's mean back to where it was.

    `embeds` `[B, L, D]`, `weights` `[B, L]` fp32. Returns `[B, L, D]` in the dtype of `embeds`.
    """
    plain = embeds.float()
    weighted = plain * weights[..., None]
    before, after = plain.mean((1, 2), keepdim=True), weighted.mean((1, 2), keepdim=True)
    return torch.where(after == 0, weighted, weighted * (before / after)).to(embeds.dtype)
