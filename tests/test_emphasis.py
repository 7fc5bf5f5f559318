"""Prompts with weights and of any length: how they are read, encoded and drawn."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from darkroom.config import Settings, load_settings
from darkroom.diffusion.emphasis import Chunk, chunked, emphasise
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.engine.engine import Failed
from darkroom.engine.prompts import Prompt, PromptCache
from darkroom.errors import JobError
from darkroom.weighted import MAX_WEIGHT, Piece, parse, text_of
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.engines import job_for, request_for, run_jobs
from tests.support.tiny_models import FAMILIES, write_tiny_model
from tests.support.twin_device import TwinDevice

# The tiny tokenizer has a token for each letter, so these are two chunks and three.
LONG = "(the red cat:1.3) on a mat, " * 10
LONGER = "a cat, on the [mat] " * 24
WEIGHTED = {"prompt_syntax": "weighted"}


def read(prompt: str) -> list[tuple[str | None, float]]:
    return [(piece.text, piece.weight) for piece in parse(prompt)]


# How AUTOMATIC1111 documents its own parser.
@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a [quiet] word", [("a ", 1.0), ("quiet", 1 / 1.1), (" word", 1.0)]),
        ("(a:1.5) (b : 0.5 )", [("a", 1.5), (" ", 1.0), ("b ", 0.5)]),
        ("(a:-1) (b:+.5)", [("a", -1.0), (" ", 1.0), ("b", 0.5)]),
        ("time 12:30) ]", [("time 12:30) ]", 1.0)]),
        (r"a\b \\ ", [(r"a\b \ ", 1.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("a BREAK b BREAKS", [("a", 1.0), (None, 1.0), ("b BREAKS", 1.0)]),
        ("(a BREAK b:1.2)", [("a", 1.2), (None, 1.2), ("b", 1.2)]),
        ("", []),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.3 * 1.1 * 1.1),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.1**4),
                (".", 1.1),
            ],
        ),
    ],
)
def test_brackets_weigh_what_they_hold(prompt: str, pieces: list[tuple[str | None, float]]) -> None:
    got = read(prompt)
    assert [text for text, _ in got] == [text for text, _ in pieces]
    for (text, weight), (_, expected) in zip(got, pieces, strict=True):
        assert text is None or math.isclose(weight, expected)


BRACKETED = st.lists(st.sampled_from(["(", ")", "[", "]", "\\", ":", ":1.3)", ":99999999)", "BREAK", " ", "a", "é"]))


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), BRACKETED.map("".join)))
def test_any_string_is_a_prompt_of_finite_weights(prompt: str) -> None:
    pieces = parse(prompt)
    assert all(math.isfinite(piece.weight) and abs(piece.weight) <= MAX_WEIGHT for piece in pieces)
    assert all(piece.text is None or piece.text for piece in pieces)
    assert sum(len(piece.text or "") for piece in pieces) <= len(prompt)
    neighbours = itertools.pairwise(pieces)
    assert not any(a.weight == b.weight and a.text is not None and b.text is not None for a, b in neighbours)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: "BREAK" not in text))
def test_what_is_escaped_is_read_as_it_stands(text: str) -> None:
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert "".join(piece.text or "" for piece in parse(escaped)) == text
    assert all(piece.weight == 1.0 for piece in parse(escaped))


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(st.characters(whitelist_categories=["L"]), min_size=1), st.integers(0, 300)), max_size=8
    ).filter(lambda pieces: all("BREAK" not in text for text, _ in pieces))
)
def test_what_was_read_can_be_written_and_read_again(written: list[tuple[str, int]]) -> None:
    pieces = parse("".join(f"({text}:{hundredths / 100})" for text, hundredths in written))
    assert parse("".join(f"({piece.text}:{piece.weight})" for piece in pieces)) == pieces
    assert "".join(piece.text or "" for piece in pieces) == "".join(text for text, _ in written)


def test_thousands_of_brackets_take_no_time_and_weigh_no_more_than_the_limit() -> None:
    pieces = parse("(a" * 16000)
    assert (pieces[0].weight, pieces[-1].weight) == (1.1, MAX_WEIGHT)
    assert parse("[" * 20000 + "b" + "]" * 20000)[0].weight == pytest.approx(0)


def test_what_a_prompt_says_has_no_brackets() -> None:
    assert text_of(r"(ga)[[n]](dalf:1.3) BREAK \(grey\) BREAK") == "gandalf (grey) "


def words(texts: list[str]) -> list[list[int]]:
    """A token for each word: its number, and 0 for a comma."""
    return [[0 if word == "," else int(word) for word in text.split()] for text in texts]


def test_a_prompt_goes_on_in_another_chunk_when_one_is_full() -> None:
    numbers = [str(number) for number in range(1, 26)]
    chunks = chunked([Piece(" ".join(numbers), 1.2)], words, 10, comma=0)
    assert [len(chunk.tokens) for chunk in chunks] == [10, 10, 5]
    assert [token for chunk in chunks for token in chunk.tokens] == list(range(1, 26))
    assert {weight for chunk in chunks for weight in chunk.weights} == {1.2}


def test_a_chunk_rather_ends_after_a_comma() -> None:
    chunks = chunked([Piece("1 2 3 4 5 6 , 7 8 9 10 11 12")], words, 10, comma=0)
    assert [chunk.tokens for chunk in chunks] == [[1, 2, 3, 4, 5, 6, 0], [7, 8, 9, 10, 11, 12]]


def test_break_ends_a_chunk_where_it_stands() -> None:
    chunks = chunked(parse("1 2 BREAK 3 BREAK BREAK 4 BREAK"), words, 10, comma=0)
    assert [chunk.tokens for chunk in chunks] == [[1, 2], [3], [], [4]]
    assert [chunk.tokens for chunk in chunked([], words, 10, comma=0)] == [[]]


def test_weights_multiply_and_the_mean_stays() -> None:
    embeds = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)) + 1
    weights = torch.tensor([[1.0, 1.5, 1.0, 0.5, 1.0], [1.0] * 5])
    got = emphasise(embeds, weights)
    assert torch.equal(got[1], embeds[1])
    assert got[0].mean().item() == pytest.approx(embeds[0].mean().item(), rel=1e-5)
    ratio = got[0] / embeds[0]
    assert torch.allclose(ratio[1] / ratio[0], torch.full((3,), 1.5))
    assert torch.allclose(ratio[3] / ratio[0], torch.full((3,), 0.5))


# In the text encoders


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = write_tiny_model(tmp_path_factory.mktemp(request.param), request.param, seed=5)
    # As in the published checkpoints of all three families; left out, ddim would clip.
    config = directory / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "clip_sample": False}))
    yield directory
    torch.set_num_threads(threads)


def expected_embeds(model: DiffusionModel, prompt: str, clip_skip: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the definition says, chunk by chunk and encoder by encoder."""
    parts, pooled = [], None
    for encoder in model.text.encoders:
        tokenizer, hidden = encoder.tokenizer, []
        for index, chunk in enumerate(encoder.chunks(prompt)):
            padding = [tokenizer.pad_token_id] * (75 - len(chunk.tokens))
            ids = [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id, *padding]
            with torch.no_grad():
                output: Any = encoder.model(torch.tensor([ids]), output_hidden_states=True)
            if index == 0:
                pooled = getattr(output, "text_embeds", None)
            if model.text.is_sdxl:
                plain = output.hidden_states[-(clip_skip + 2)][0]
            else:
                plain = encoder.body.final_layer_norm(output.hidden_states[-(clip_skip + 1)])[0]
            weighted = plain.clone()
            for token, weight in enumerate(chunk.weights):
                weighted[token + 1] *= weight
            hidden.append(weighted * (plain.mean() / weighted.mean()))
        parts.append(torch.cat(hidden))
    return torch.cat(parts, dim=-1), None if pooled is None else pooled[0]


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_prompts_of_several_chunks_embed_as_the_definition_says(checkpoint: Path, clip_skip: int) -> None:
    model = load_model(checkpoint)
    prompts = [LONG, "(a cat:1.4)", LONGER]
    found = model.text.encode(prompts, clip_skip, weighted=True)
    assert [len(one.prompt_embeds) // 77 for one in found] == [model.text.num_chunks(prompt) for prompt in prompts]
    assert [model.text.num_chunks(prompt) for prompt in prompts] == [2, 1, 3]
    for prompt, got in zip(prompts, found, strict=True):
        embeds, pooled = expected_embeds(model, prompt, clip_skip)
        assert (got.prompt_embeds - embeds).abs().max() <= 1e-4 * embeds.abs().max()
        assert (pooled is None) == (got.pooled_prompt_embeds is None)
        if pooled is not None and got.pooled_prompt_embeds is not None:
            assert (got.pooled_prompt_embeds - pooled).abs().max() <= 1e-4 * pooled.abs().max()


def test_a_short_prompt_without_brackets_embeds_as_a_plain_one(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    for prompt in ("the red cat", "", "👩‍🚀 <|endoftext|> \ud800"):
        for negative in (False, True):
            (plain,) = model.text.encode([prompt], negative=negative)
            (weighted,) = model.text.encode([prompt], negative=negative, weighted=True)
            assert torch.equal(plain.prompt_embeds, weighted.prompt_embeds)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.text(max_size=120))
def test_no_prompt_with_weights_breaks_the_encoder(small: DiffusionModel, prompt: str) -> None:
    (got,) = small.text.encode([prompt], weighted=True)
    assert len(got.prompt_embeds) == 77 * small.text.num_chunks(prompt)
    assert got.prompt_embeds.isfinite().all()


# In the engine


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("small"), "sd1", seed=3), kernels="torch")
    torch.set_num_threads(threads)


def settings_with(**fields: object) -> Settings:
    return load_settings(num_threads=1, encode_threads=1, dtype="fp32", **fields)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("prompt", "negative_prompt"), [(LONGER, "(a mat:1.2)"), ("a mat", LONG), (LONG, LONG)])
def test_a_picture_of_long_prompts_is_the_one_of_diffusers(checkpoint: Path, prompt: str, negative_prompt: str) -> None:
    """diffusers takes embeddings of one length only. To read every token twice is to read it once."""
    model = load_model(checkpoint)
    request = request_for(model, prompt=prompt, negative_prompt=negative_prompt, sampler="ddim", **WEIGHTED)
    job = job_for(model, "one", prompt=prompt, negative_prompt=negative_prompt, sampler="ddim", **WEIGHTED)
    ours = run_jobs(model, [job], settings_with()).pixels("one")

    (cond,) = model.text.encode([prompt], weighted=True)
    (uncond,) = model.text.encode([negative_prompt], negative=True, weighted=True)
    length = math.lcm(len(cond.prompt_embeds), len(uncond.prompt_embeds))
    arguments: dict[str, Any] = {
        "prompt_embeds": cond.prompt_embeds.repeat(length // len(cond.prompt_embeds), 1)[None],
        "negative_prompt_embeds": uncond.prompt_embeds.repeat(length // len(uncond.prompt_embeds), 1)[None],
    }
    if cond.pooled_prompt_embeds is not None and uncond.pooled_prompt_embeds is not None:
        arguments["pooled_prompt_embeds"] = cond.pooled_prompt_embeds[None]
        arguments["negative_pooled_prompt_embeds"] = uncond.pooled_prompt_embeds[None]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        **arguments,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    difference = np.abs(ours - np.asarray(theirs).astype(np.int16))
    assert ours.std() > 1
    assert np.quantile(difference, 0.999) <= 1


CROWD: list[dict[str, Any]] = [
    {"prompt": LONG, "negative_prompt": "a cat", "seed": 1, **WEIGHTED},
    {"prompt": "(a cat:1.3)", "seed": 2, "num_inference_steps": 3, **WEIGHTED},
    {"prompt": "a mat", "negative_prompt": LONG, "seed": 3, **WEIGHTED},
    {"prompt": LONGER, "negative_prompt": LONG, "seed": 4, "sampler": "euler_a", **WEIGHTED},
    {"prompt": LONG, "guidance_scale": 1.0, "seed": 5, "num_inference_steps": 6, **WEIGHTED},
    {"prompt": "the red cat", "seed": 6},
]


@pytest.mark.parametrize("batching", ["fast", "reproducible"])
def test_long_prompts_draw_the_same_alone_and_in_a_crowd(small: DiffusionModel, batching: str) -> None:
    settings = settings_with(batching=batching, reproducible_rows=6)
    jobs = [job_for(small, str(index), **fields) for index, fields in enumerate(CROWD)]
    crowd = run_jobs(small, jobs, settings)
    assert max(tick.num_rows for tick in crowd.ticks) > 1
    for job in jobs:
        alone = run_jobs(small, [job], settings)
        if batching == "reproducible":
            assert alone.images(job.id) == crowd.images(job.id)
        else:
            assert np.abs(alone.pixels(job.id) - crowd.pixels(job.id)).max() <= 1


def test_long_prompts_draw_the_same_beside_captured_ticks(small: DiffusionModel) -> None:
    settings = settings_with(batching="reproducible", reproducible_rows=6)
    jobs = [job_for(small, str(index), **fields) for index, fields in enumerate(CROWD)]
    plain = run_jobs(small, jobs, settings)
    device = TwinDevice()
    twin = run_jobs(small, jobs, settings, device=device, warm_up=True)
    for job in jobs:
        assert twin.images(job.id) == plain.images(job.id)
    assert "replay" in device.log


def test_a_prompt_of_too_many_chunks_fails_alone_and_says_the_limit(small: DiffusionModel) -> None:
    jobs = [
        job_for(small, "long", prompt="a cat BREAK " * 3, **WEIGHTED),
        job_for(small, "good", prompt="a cat BREAK a mat", **WEIGHTED),
        job_for(small, "plain", prompt=LONGER),
    ]
    outcome = run_jobs(small, jobs, settings_with(max_prompt_chunks=2))
    failed = outcome.events["long"]
    assert isinstance(failed, Failed)
    assert failed.failure.code == "prompt_too_long"
    assert failed.failure.message == "prompt: got 3 chunks of 75 tokens, expected at most 2"
    assert outcome.images("good")
    assert outcome.images("plain")


@pytest.mark.parametrize("attention", ["cudnn", "flash", "efficient"])
def test_attention_that_takes_no_lengths_says_its_limit_before_a_tick_fails(
    small: DiffusionModel, attention: str
) -> None:
    jobs = [
        job_for(small, "two chunks", prompt="a cat BREAK a mat", **WEIGHTED),
        job_for(small, "one chunk", prompt="a (cat:1.2)", **WEIGHTED),
    ]
    outcome = run_jobs(small, jobs, settings_with(attention=attention))
    failed = outcome.events["two chunks"]
    assert isinstance(failed, Failed)
    assert failed.failure.code == "prompt_too_long"
    assert failed.failure.message == "prompt: got 2 chunks of 75 tokens, expected at most 1"
    assert outcome.images("one chunk")


def test_a_long_text_takes_a_place_of_the_store_for_each_chunk_and_gives_them_back(small: DiffusionModel) -> None:
    cache = PromptCache(small, 0, batch_alone=False, num_in_use=4, max_chunks=3)
    long, longer, plain = (Prompt(text, 0, False, True) for text in (LONG, LONGER, "a cat"))
    assert cache.has_room([long, plain])
    found = cache.encode([long, plain])
    assert [len(found[prompt].slots) for prompt in (long, plain)] == [2, 1]
    (expected,) = small.text.encode([LONG], weighted=True)
    text_kv = small.unet.text_kv(expected.prompt_embeds[None])[0]
    assert torch.allclose(found[long].text_kv, text_kv, atol=1e-5)
    assert not cache.has_room([long, plain, Prompt("a mat BREAK a mat", 0, False, True)])
    cache.release(found.values())
    assert sorted(cache._free) == [0, 1, 2, 3]
    with pytest.raises(JobError, match=r"got 3 chunks of 75 tokens, expected at most 2"):
        cache.encode([longer])


def test_chunks_know_whether_they_are_weighted() -> None:
    assert not Chunk([1], [1.0]).is_weighted
    assert Chunk([1, 2], [1.0, 1.1]).is_weighted
