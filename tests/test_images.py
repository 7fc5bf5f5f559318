"""Pictures on disk: pixels survive, and the request written into the file comes back whole."""

from __future__ import annotations

import io
import json
import random
import re
from typing import Any

import hypothesis
import numpy as np
import pytest
from darkroom.diffusion.images import encode_image, read_parameters
from darkroom.infotext import infotext, parse
from darkroom.jobs import GenerationRequest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

FORMATS = ("png", "jpeg", "webp")
HOSTILE_PROMPTS = {
    "plain": "a red fox",
    "empty": "",
    "separators": 'fox, "red": {seed: 1}, \\ back\nNegative prompt: none\nSteps: 3, Seed: 4',
    "emoji": "🦊👩‍🚀 fox 🌌",
    "right to left": "שועל אדום \u202e reversed \u202c ثعلب",
    "control characters": "a\0b\x01\x1b[31m\r\n\t\x7f",
    "latin-1": "café ÿ",
    "longest": "x" * 8000,
    "longest of emoji": "🦊" * 8000,
    "longest of controls": "\x01" * 8000,
}


def make_request(prompt: str = "a red fox", **changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "prompt": prompt,
        "model": "emoji-world",
        "width": 24,
        "height": 16,
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "seed": 41,
        "sampler": "euler_a",
        "sigma_schedule": "karras",
    }
    return GenerationRequest(**{**values, **changes})


def make_pixels() -> np.ndarray:
    """A smooth picture, so that lossy formats stay close to it."""
    rows, columns = np.mgrid[0:16, 0:24]
    return np.stack([rows * 15, columns * 10, 255 - rows * 15], axis=2).astype(np.uint8)


def encode(request: GenerationRequest, index: int = 0) -> bytes:
    return encode_image(make_pixels(), request, index, model_hash="sha256:0123456789abcdef", version="1.2.3")


def exif_comment(data: bytes) -> bytes | None:
    with Image.open(io.BytesIO(data)) as image:
        comment: bytes | None = image.getexif().get_ifd(0x8769).get(0x9286)
        return comment


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("prompt", HOSTILE_PROMPTS.values(), ids=HOSTILE_PROMPTS)
def test_every_prompt_comes_back_from_the_file(output_format: str, prompt: str) -> None:
    request = make_request(prompt, negative_prompt=prompt[::-1], output_format=output_format)
    record = read_parameters(encode(request))
    assert record is not None
    assert record["request"]["prompt"] == prompt
    assert record["request"]["negative_prompt"] == prompt[::-1]
    assert GenerationRequest(**record["request"]) == request
    assert record["weights_hash"] == "sha256:0123456789abcdef"
    assert record["version"] == "1.2.3"


@pytest.mark.parametrize("output_format", FORMATS)
def test_each_image_of_a_request_records_its_own_seed(output_format: str) -> None:
    record = read_parameters(encode(make_request(num_images_per_prompt=4, output_format=output_format), index=3))
    assert record is not None
    assert record["request"]["seed"] == 44
    assert record["request"]["num_images_per_prompt"] == 1


@pytest.mark.parametrize("output_format", FORMATS)
def test_lone_surrogates_are_replaced(output_format: str) -> None:
    record = read_parameters(encode(make_request("a\ud800b", negative_prompt="\udfff", output_format=output_format)))
    assert record is not None
    assert record["request"]["prompt"] == "a�b"
    assert record["request"]["negative_prompt"] == "�"


def test_png_keeps_every_pixel() -> None:
    with Image.open(io.BytesIO(encode(make_request()))) as image:
        assert np.array_equal(np.asarray(image), make_pixels())


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lossy_formats_stay_close(output_format: str) -> None:
    with Image.open(io.BytesIO(encode(make_request(output_format=output_format)))) as image:
        assert image.mode == "RGB"
        error = np.abs(np.asarray(image).astype(int) - make_pixels())
    assert error.mean() < 3


def test_pixels_may_be_a_strided_view() -> None:
    flipped = make_pixels()[:, ::-1]
    data = encode_image(flipped, make_request(), 0, model_hash="", version="1")
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), flipped)


def test_the_parameters_text_is_the_one_other_tools_read() -> None:
    request = make_request("a fox,\nred", negative_prompt="blurry", model="my, model", clip_skip=1, guidance_scale=7.0)
    assert infotext(request, 1, model_hash="sha256:0123456789abcdef", version="1.2.3") == (
        "a fox,\nred\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 24x16, "
        'Model hash: 0123456789, Model: "my, model", Clip skip: 2, Version: darkroom 1.2.3'
    )


def test_a_picture_drawn_from_another_says_how_much_it_may_differ() -> None:
    request = make_request(init_image="a hash", strength=0.75)
    text = infotext(request, 0, model_hash="", version="1")
    assert text.split("\n")[-1].endswith(", Denoising strength: 0.75, Version: darkroom 1")
    data = encode(request)
    with Image.open(io.BytesIO(data)) as image:
        assert "Denoising strength: 0.75" in image.info["parameters"]
    record = read_parameters(data)
    assert record is not None
    assert (record["request"]["strength"], record["request"]["init_image"]) == (0.75, "a hash")


def test_without_a_negative_prompt_its_line_is_left_out() -> None:
    text = infotext(make_request(), 0, model_hash="", version="1")
    assert text.count("\n") == 1
    assert "Negative prompt" not in text
    assert "Clip skip" not in text
    assert "Denoising strength" not in text


@pytest.mark.parametrize("model", ["a,b", "a: b", "a\nb", 'say "hi"', "back\\slash, too"])
def test_a_value_with_separators_is_quoted_so_that_the_common_parser_gives_it_back(model: str) -> None:
    last_line = infotext(make_request(model=model), 0, model_hash="", version="1").split("\n")[-1]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last_line))
    assert json.loads(pairs["Model"]) == model
    assert pairs["Version"] == "darkroom 1"


def test_brackets_that_are_text_are_told_to_tools_that_would_weigh_them() -> None:
    assert ", Emphasis: None, " in infotext(make_request("a (red) fox"), 0, model_hash="", version="1")
    weighted = make_request("a (red) fox", prompt_syntax="weighted")
    assert "Emphasis" not in infotext(weighted, 0, model_hash="", version="1")


def test_what_another_tool_wrote_is_read() -> None:
    text = (
        "a (fox:1.2), red\nat dawn\nNegative prompt: [blurry]\nbad\n"
        'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 965400086, Size: 512x768, Lora hashes: "a: 1, b: \\"2\\"", '
        "Version: v1.9.4"
    )
    found = parse(text)
    assert (found.prompt, found.negative_prompt) == ("a (fox:1.2), red\nat dawn", "[blurry]\nbad")
    assert found.values == {
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "CFG scale": "7",
        "Seed": "965400086",
        "Size": "512x768",
        "Lora hashes": 'a: 1, b: "2"',
        "Version": "v1.9.4",
    }


def test_a_text_without_values_is_a_prompt() -> None:
    assert parse("a fox: red, and\nblue: yes").prompt == "a fox: red, and\nblue: yes"
    assert parse("") == parse(" \n ")


LINE = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"])).map(str.strip)


@hypothesis_settings(max_examples=200, deadline=None)
@given(LINE, LINE, st.text(st.characters(blacklist_categories=["Cs"])), st.integers(0, 2**40))
def test_a_written_text_is_read_as_it_was_meant(prompt: str, negative_prompt: str, model: str, seed: int) -> None:
    hypothesis.assume(not prompt.startswith("Negative prompt:"))
    request = make_request(prompt, negative_prompt=negative_prompt, model=model.replace("\0", ""), seed=seed)
    found = parse(infotext(request, 2, model_hash="sha256:0123456789abcdef", version="1.2.3"))
    assert (found.prompt, found.negative_prompt) == (prompt, negative_prompt)
    assert found.values["Seed"] == str(seed + 2)
    assert found.values["Model"].strip() == request.model.strip()
    assert found.values["Size"] == "24x16"


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from([*'a:,"\\ \n', "Steps: 20", '"x": "']), max_size=60).map("".join)))
def test_any_text_is_read(text: str) -> None:
    found = parse(text)
    assert len(found.prompt) + len(found.negative_prompt) <= len(text)
    assert all(isinstance(value, str) for value in found.values.values())


def test_a_long_text_is_read_at_once() -> None:
    for text in ("a" * 1_000_000, "a:" * 200_000, ('x: "' * 100_000), " " * 1_000_000 + ":"):
        parse(text)


@pytest.mark.parametrize(("prompt", "chunk"), [("café", b"tEXt"), ("🦊", b"iTXt")])
def test_png_parameters_are_itxt_only_when_they_must_be(prompt: str, chunk: bytes) -> None:
    data = encode(make_request(prompt))
    assert chunk + b"parameters\0" in data
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["parameters"].startswith(prompt + "\nSteps: 20")


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_exif_user_comment_is_unicode_in_big_endian(output_format: str) -> None:
    request = make_request("🦊 שועל", output_format=output_format)
    comment = exif_comment(encode(request))
    assert comment is not None
    assert comment.startswith(b"UNICODE\0")
    expected = infotext(request, 0, model_hash="sha256:0123456789abcdef", version="1.2.3")
    assert comment[8:].decode("utf-16-be") == expected


def test_a_jpeg_too_small_for_the_text_still_carries_the_record() -> None:
    """A JPEG segment ends at 64 KiB: the EXIF text is left out, the record goes over several comment segments."""
    prompt = "🦊" * 20_000
    data = encode(make_request(prompt, output_format="jpeg"))
    record = read_parameters(data)
    assert exif_comment(data) is None
    assert record is not None
    assert record["request"]["prompt"] == prompt


def test_other_pictures_and_garbage_have_no_parameters() -> None:
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    foreign = io.BytesIO()
    Image.new("RGB", (8, 8)).save(foreign, "JPEG", comment=b"made elsewhere")
    for data in (plain.getvalue(), foreign.getvalue(), b"", b"not a picture", encode(make_request())[:40]):
        assert read_parameters(data) is None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("output_format", FORMATS)
def test_damaged_files_never_raise(output_format: str) -> None:
    data = encode(make_request("🦊", output_format=output_format))
    chooser = random.Random(7)
    for _ in range(400):
        damaged = bytearray(data[: chooser.randrange(len(data)) if chooser.random() < 0.3 else len(data)])
        for _ in range(chooser.randrange(1, 8)):
            if damaged:
                damaged[chooser.randrange(min(len(damaged), 900))] = chooser.randrange(256)
        record = read_parameters(bytes(damaged))
        assert record is None or isinstance(record, dict)


def test_a_format_that_is_not_offered_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of png, jpeg, webp, got 'gif'"):
        encode(make_request(output_format="gif"))


@pytest.mark.parametrize("shape", [(16, 24), (16, 24, 4), (1, 16, 24, 3)])
def test_pixels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        encode_image(np.zeros(shape, np.uint8), make_request(), 0, model_hash="", version="1")
