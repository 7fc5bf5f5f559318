"""Prompts embed as in diffusers' pipelines, and no prompt breaks the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.errors import InvalidRequest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from support.tiny_models import FAMILIES, Family, fresh_seed, write_tiny_model

TOLERANCE = 1e-4
PROMPTS = ["the red cat", "", "a cat on the the mat " * 40]


class Pair:
    """A checkpoint on disk, read by diffusers and by us."""

    def __init__(self, family: Family, directory: Path, seed: int):
        write_tiny_model(directory, family, seed=seed)
        if family == "sdxl":
            self.theirs: Any = StableDiffusionXLPipeline.from_pretrained(directory)
        else:
            self.theirs = StableDiffusionPipeline.from_pretrained(directory, safety_checker=None)
        self.theirs.set_progress_bar_config(disable=True)
        self.ours: DiffusionModel = load_model(directory)

    def oracle(self, prompt: str | None, clip_skip: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """diffusers' embeddings of a prompt, `[L, D]` and `[P]`; of None, those of a negative prompt not given."""
        options = {"device": "cpu", "num_images_per_prompt": 1, "clip_skip": clip_skip}
        negative = prompt is None
        answer = self.theirs.encode_prompt("x" if negative else prompt, do_classifier_free_guidance=negative, **options)
        pooled = answer[3 if negative else 2][0] if len(answer) == 4 else None
        return answer[int(negative)][0], pooled


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param), fresh_seed())


def assert_near(expected: torch.Tensor | None, got: torch.Tensor | None) -> None:
    assert (expected is None) == (got is None)
    if expected is not None and got is not None:
        assert expected.shape == got.shape
        assert (expected - got).abs().max() <= TOLERANCE * expected.abs().max()


def test_prompts_embed_as_in_diffusers_alone_and_together(pair: Pair) -> None:
    for prompt, got in zip(PROMPTS, pair.ours.text.encode(PROMPTS), strict=True):
        embeds, pooled = pair.oracle(prompt)
        assert_near(embeds, got.prompt_embeds)
        assert_near(pooled, got.pooled_prompt_embeds)


def test_clip_skip_leaves_layers_out_as_in_diffusers(pair: Pair) -> None:
    text = pair.ours.text
    plain = text.encode(["the red cat"])[0]
    for skip in range(1, text.max_clip_skip + 1):
        got = text.encode(["the red cat"], clip_skip=skip)[0]
        if text.is_sdxl:
            assert_near(pair.oracle("the red cat", skip)[0], got.prompt_embeds)
        else:
            # diffusers 0.42 looks for an inner module that transformers 5 no longer has, so its two lines stand here.
            encoder, tokenizer = pair.theirs.text_encoder, pair.theirs.tokenizer
            tokens = tokenizer("the red cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
            with torch.no_grad():
                hidden = encoder(tokens, output_hidden_states=True).hidden_states[-(skip + 1)]
                assert_near(encoder.final_layer_norm(hidden)[0], got.prompt_embeds)
        assert (got.prompt_embeds - plain.prompt_embeds).abs().max() > 0.01
    assert torch.equal(
        text.encode(["cat"], clip_skip=1, negative=True)[0].prompt_embeds,
        text.encode(["cat"], negative=True)[0].prompt_embeds,
    )


def test_clip_skip_out_of_range_is_refused(pair: Pair) -> None:
    for skip in (-1, pair.ours.card.max_clip_skip + 1):
        with pytest.raises(InvalidRequest, match="clip_skip"):
            pair.ours.text.encode(["cat"], clip_skip=skip)


def test_an_empty_negative_prompt_is_what_diffusers_makes_of_none(pair: Pair) -> None:
    """SDXL asks for zeros (`force_zeros_for_empty_prompt`); a written prompt is embedded in every family."""
    empty, written = pair.ours.text.encode(["", "cat"], negative=True)
    embeds, pooled = pair.oracle(None)
    assert_near(embeds, empty.prompt_embeds)
    assert_near(pooled, empty.pooled_prompt_embeds)
    assert (empty.prompt_embeds.abs().max() == 0) == pair.ours.text.is_sdxl
    assert written.prompt_embeds.abs().max() > 0


HOSTILE = {
    "null byte": "a\0b",
    "lone surrogates": "\ud800 cat \udfff",
    "split pair": "\ud83d\ude00",
    "emoji": "👩‍🚀🏳️‍🌈" * 50,
    "right to left": "שלום \u202eabc\u202c",
    "special tokens": "<|endoftext|> <|startoftext|> cat",
    "only spaces": " \t\n\u3000 ",
    "controls": "".join(map(chr, range(32))),
    "very long word": "x" * 32000,
    "combining": "e" + "\u0301" * 500,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_prompt_breaks_the_encoder(pair: Pair, name: str) -> None:
    text = pair.ours.text
    (got,) = text.encode([HOSTILE[name]])
    assert got.prompt_embeds.shape == (text.max_tokens, text.width)
    assert got.prompt_embeds.isfinite().all()


def test_a_split_surrogate_pair_is_the_character_it_spells(pair: Pair) -> None:
    split, whole = pair.ours.text.encode(["\ud83d\ude00", "\U0001f600"])
    assert torch.equal(split.prompt_embeds, whole.prompt_embeds)


def test_no_prompts_give_no_embeddings(pair: Pair) -> None:
    assert pair.ours.text.encode([]) == []
