"""Prompts with weights and of any length, as AUTOMATIC1111 means them.

The tokens of a prompt's pieces (`darkroom.weighted`) are cut into chunks that the text encoder can take, and what the
encoder makes of a token is multiplied by its weight. Source: AUTOMATIC1111/stable-diffusion-webui
modules/sd_hijack_clip.py (the chunks), modules/sd_emphasis.py ("Original").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from darkroom.weighted import Piece

# A chunk that is full goes on in the next one after its last comma, if that is at most so many tokens back.
COMMA_REACH = 20


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
