"""Pictures from strangers: every kind of file ends as a plain PNG or in one clear refusal."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from darkroom.api.pictures import fitted, read_pictures
from darkroom.config import Settings
from darkroom.errors import InvalidRequest
from darkroom.jobs import INPUT_NAMES
from darkroom.queue import JobQueue
from darkroom.queue.keys import Keys
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.http import in_process
from tests.support.instant_worker import InstantWorker

pytest_plugins = "tests.support.service"

FOX = {"prompt": "a red fox in the snow", "seed": 1}
MAX_PIXELS = 1 << 16


def written(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def halves(mode: str = "RGB", left: Any = (200, 30, 20), right: Any = (20, 60, 180)) -> Image.Image:
    """Sixteen by eight pixels of two colours."""
    image = Image.new(mode, (16, 8), right)
    image.paste(left, (0, 0, 8, 8))
    return image


def read(init_image: str | bytes, mask_image: str | bytes | None = None, **options: Any) -> dict[str, Any]:
    """What a job of sixteen by eight pixels would bring, as arrays."""
    pictures = read_pictures(init_image, mask_image, max_pixels=MAX_PIXELS, **options)
    return {
        name: np.asarray(Image.open(io.BytesIO(content))).astype(int)
        for name, content in fitted(pictures, 16, 8, "stretch").items()
    }


def refusal(sent: str | bytes) -> str:
    with pytest.raises(InvalidRequest) as raised:
        read_pictures(sent, max_pixels=MAX_PIXELS)
    assert str(raised.value).startswith("init_image: got ")
    return str(raised.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_each_format_is_told_by_its_bytes_whatever_it_is_called(kind: str) -> None:
    content = written(halves(), kind)
    for sent in (
        content,
        base64_of(content),
        f"data:image/gif;base64,{base64_of(content)}",
        f"DATA:;BASE64,{base64_of(content)}",
        base64.encodebytes(content).decode(),
    ):
        got = read(sent)["init_image"]
        assert np.abs(got[:, 2] - (200, 30, 20)).max() < 12
        assert np.abs(got[:, 13] - (20, 60, 180)).max() < 12


def test_one_request_is_known_again_however_it_was_written() -> None:
    content, other = written(halves()), written(halves("L", 0, 255))
    digests = [
        read_pictures(*sent, max_pixels=MAX_PIXELS).digest
        for sent in [(content, None), (base64_of(content), None), (content, other), (other, content), (other, None)]
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


ODD_MODES: dict[str, tuple[bytes, tuple[int, int, int], tuple[int, int, int]]] = {
    "grey": (written(halves("L", 40, 200)), (40,) * 3, (200,) * 3),
    "black and white": (written(halves("1", 0, 1)), (0,) * 3, (255,) * 3),
    "palette": (written(halves().quantize(4)), (200, 30, 20), (20, 60, 180)),
    "sixteen bits": (
        written(Image.fromarray(np.repeat([[257 * 40] * 8 + [257 * 200] * 8], 8, 0).astype(np.uint16))),
        (40,) * 3,
        (200,) * 3,
    ),
    "transparent turns white": (written(halves("RGBA", (9, 9, 9, 0), (20, 60, 180, 255))), (255,) * 3, (20, 60, 180)),
    "grey and transparent": (written(halves("LA", (9, 0), (80, 255))), (255,) * 3, (80,) * 3),
    "a transparent colour": (written(halves("L", 7, 99), transparency=7), (255,) * 3, (99,) * 3),
    "transparent palette": (written(halves().quantize(4), transparency=0), (255,) * 3, (20, 60, 180)),
    "CMYK": (written(halves().convert("CMYK"), "JPEG", quality=100, subsampling=0), (200, 30, 20), (20, 60, 180)),
}


@pytest.mark.parametrize("name", ODD_MODES)
def test_every_kind_of_pixel_becomes_plain_colour(name: str) -> None:
    content, left, right = ODD_MODES[name]
    got = read(content)["init_image"]
    assert got.shape == (8, 16, 3)
    first, second = (
        (left, right)
        if name != "transparent palette" or np.abs(got[4, 2] - left).max() < 12
        else (
            (200, 30, 20),
            (255,) * 3,
        )
    )
    assert np.abs(got[4, 2] - first).max() < 12
    assert np.abs(got[4, 13] - second).max() < 12


def test_of_a_cameras_file_with_further_pictures_the_photograph_is_taken() -> None:
    content = written(halves(), "MPO", save_all=True, append_images=[halves(left=(0, 0, 0))])
    assert np.abs(read(content)["init_image"][:, 2] - (200, 30, 20)).max() < 12


def test_of_a_huge_photograph_no_more_is_decoded_than_can_be_drawn() -> None:
    content = written(Image.new("RGB", (4800, 4100), (200, 30, 20)), "JPEG")
    pictures = read_pictures(content, max_pixels=1 << 25)
    assert pictures.size == (2400, 2050)
    assert np.abs(np.asarray(pictures.init_image).astype(int)[2000, 2300] - (200, 30, 20)).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_that_was_taken_sideways_is_turned_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    pictures = read_pictures(written(halves(), kind, exif=exif), max_pixels=MAX_PIXELS)
    assert pictures.size == (8, 16)
    assert np.abs(np.asarray(pictures.init_image).astype(int)[2, 4] - (200, 30, 20)).max() < 12


def test_nothing_of_the_file_but_its_pixels_goes_further() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    content = written(halves(), "JPEG", exif=exif, comment=b"a secret", icc_profile=b"a secret") + b"a secret"
    (got,) = fitted(read_pictures(content, max_pixels=MAX_PIXELS), 16, 8, "stretch").values()
    assert b"secret" not in got
    with Image.open(io.BytesIO(got)) as image:
        assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)], ids=str)
@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "fill"])
def test_the_smallest_and_thinnest_pictures_fit_any_size(size: tuple[int, int], resize_mode: str) -> None:
    pictures = read_pictures(written(Image.new("RGB", size, "red")), max_pixels=MAX_PIXELS)
    (got,) = fitted(pictures, 64, 32, resize_mode).values()
    image = Image.open(io.BytesIO(got))
    assert image.size == (64, 32)
    assert image.getcolors() == [(64 * 32, (255, 0, 0))]


def test_other_proportions_are_stretched_cropped_or_filled() -> None:
    pictures = read_pictures(written(halves()), written(halves("L", 0, 255)), max_pixels=MAX_PIXELS)
    columns = {}
    for mode in ("stretch", "crop", "fill"):
        contents = fitted(pictures, 64, 64, mode)
        image = np.asarray(Image.open(io.BytesIO(contents["init_image"]))).astype(int)
        mask = np.asarray(Image.open(io.BytesIO(contents["mask_image"])))
        assert mask.shape == (64, 64)
        assert mask[32, 60] > 250
        assert np.abs(image[2, 4] - (200, 30, 20)).max() < 12
        columns[mode] = image[32, :, 0]
    # Cropping shows the middle half at twice the size, so the edge between the colours is wider.
    assert np.count_nonzero((columns["crop"] > 40) & (columns["crop"] < 180)) > np.count_nonzero(
        (columns["stretch"] > 40) & (columns["stretch"] < 180)
    )


def test_of_a_mask_white_is_new_and_what_is_transparent_is_kept() -> None:
    image = written(halves())
    mask = written(halves("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)))
    got = read(image, mask)["mask_image"]
    assert (got[:, 2] == 255).all()
    assert (got[:, 13] == 0).all()


def test_a_mask_may_say_it_by_transparency_instead() -> None:
    image = written(halves())
    mask = written(halves("RGBA", (0, 0, 0, 0), (255, 255, 255, 255)))
    got = read(image, mask, mask_is_alpha=True)["mask_image"]
    assert (got[:, 2] == 255).all()
    assert (got[:, 13] == 0).all()
    with pytest.raises(InvalidRequest, match="mask_image: got a picture without transparency"):
        read(image, image, mask_is_alpha=True)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its bytes could hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    return written(halves(), kind, save_all=True, append_images=[halves(left=(0, 0, 0))])


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "an address": ("https://example.com/cat.png", "a https: address"),
    "an address without TLS": ("HTTP://169.254.169.254/latest", "a http: address"),
    "a file": ("file:///etc/passwd", "a file: address"),
    "a data URL that is text": ("data:image/png,hello", "a data URL without ;base64"),
    "no base64": ("this is no picture!", "no valid base64"),
    "broken base64": (base64_of(written(halves()))[:-3], "no valid base64"),
    "letters beyond ASCII": ("ÿÿÿÿ", "no valid base64"),
    "nothing": ("", "0 bytes that are none"),
    "garbage": (b"\x00\x01\x02" * 50, "150 bytes that are none"),
    "a GIF": (written(halves(), "GIF"), "that are none"),
    "a BMP": (written(halves(), "BMP"), "that are none"),
    "a TIFF": (written(halves(), "TIFF"), "that are none"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "that are none"),
    "a PNG that breaks off": (written(Image.effect_noise((64, 64), 90))[:-400], "that are none"),
    "a JPEG that breaks off": (written(Image.effect_noise((64, 64), 90), "JPEG")[:-400], "that are none"),
    "a WebP that breaks off": (written(Image.effect_noise((64, 64), 90), "WEBP")[:-400], "that are none"),
    "an animated PNG": (animation("PNG"), "an animation"),
    "an animated WebP": (animation("WEBP"), "an animation"),
    "a large picture": (written(Image.new("1", (257, 256))), "a larger picture"),
    "a bomb": (bomb(30_000, 30_000), "a larger picture"),
    "a bomb at which Pillow only warns": (bomb(10_000, 10_000), "a larger picture"),
    "a bomb of one row": (bomb(1 << 30, 1), "a larger picture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_still_picture_is_refused_by_name_and_never_shown(name: str) -> None:
    sent, told = REFUSED[name]
    message = refusal(sent)
    assert told in message
    assert len(message) < 300
    assert message.isascii()


SEEDS = [written(halves(), kind) for kind in ("PNG", "JPEG", "WEBP")] + [
    animation("PNG"),
    written(halves().quantize(4)),
]


@st.composite
def spoilt_pictures(draw: st.DrawFn) -> bytes:
    """A picture with a few bytes changed, cut off or put in."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        content[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(content)


@given(sent=st.binary(max_size=300) | spoilt_pictures() | st.text(max_size=100))
@hypothesis_settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_at_all_are_a_picture_or_refused(sent: bytes | str) -> None:
    refused: InvalidRequest | None = None
    try:
        assert fitted(read_pictures(sent, sent, max_pixels=MAX_PIXELS), 8, 8, "fill").keys() == set(INPUT_NAMES)
    except InvalidRequest as error:
        refused = error
    assert refused is None or (refused.field in INPUT_NAMES and str(refused).isascii())


@pytest_asyncio.fixture
async def client(settings: Settings, queue: JobQueue, worker: InstantWorker) -> AsyncIterator[httpx.AsyncClient]:
    update = {"max_body_bytes": 20_000, "max_image_bytes": 200_000}
    async with in_process(settings.model_copy(update=update), queue) as client:
        yield client


async def test_a_picture_reaches_the_worker_at_the_size_of_the_request(
    client: httpx.AsyncClient, worker: InstantWorker, queue: JobQueue, settings: Settings
) -> None:
    body = {**FOX, "init_image": base64_of(written(halves())), "mask_image": base64_of(written(halves("L", 0, 255)))}
    reply = await client.post("/generate", json={**body, "width": 64, "height": 32, "strength": 0.5})
    assert reply.status_code == 200, reply.text
    inputs = worker.inputs[reply.json()["job_id"]]
    sizes = {
        name: (image.mode, image.size) for name, image in ((n, Image.open(io.BytesIO(c))) for n, c in inputs.items())
    }
    assert sizes == {"init_image": ("RGB", (64, 32)), "mask_image": ("L", (64, 32))}
    manifest = reply.json()["manifest"]
    assert manifest["strength"] == 0.5
    assert len(manifest["init_image"]) == len(manifest["mask_image"]) == 64
    # Nothing of it is left when the job has ended.
    left = await queue._connection.command("KEYS", f"{Keys(settings.shard).prefix}*{reply.json()['job_id']}*")
    assert not [key for key in left if b"input" in key or b"staged" in key]


@pytest.mark.parametrize(
    ("size", "asked", "drawn"),
    [
        ((100, 50), {}, (96, 48)),
        ((4000, 1000), {}, (256, 64)),
        ((1, 1), {}, (8, 8)),
        ((100, 50), {"width": 64}, (64, 32)),
        ((100, 50), {"height": 64}, (128, 64)),
        ((100, 50), {"width": 40, "height": 80}, (40, 80)),
    ],
    ids=str,
)
async def test_a_size_that_is_left_out_follows_the_picture(
    client: httpx.AsyncClient, size: tuple[int, int], asked: dict[str, int], drawn: tuple[int, int]
) -> None:
    content = base64_of(written(Image.new("RGB", size, "red")))
    reply = await client.post("/generate", json={**FOX, **asked, "init_image": content})
    assert reply.status_code == 200, reply.text
    manifest = reply.json()["manifest"]
    assert (manifest["width"], manifest["height"]) == drawn
    assert manifest["strength"] == 0.8


async def test_strength_makes_a_job_cheaper_and_too_little_of_it_is_refused(
    client: httpx.AsyncClient, queue: JobQueue
) -> None:
    body = {**FOX, "init_image": base64_of(written(halves())), "num_inference_steps": 20, "mode": "async"}
    costs = {}
    for strength in (1.0, 0.5, 0.05):
        job_id = (await client.post("/generate", json={**body, "strength": strength})).json()["job_id"]
        costs[strength] = (await queue.status(job_id)).job.cost
    without = (await client.post("/generate", json={**FOX, "mode": "async", "width": 16, "height": 8})).json()["job_id"]
    one = (await queue.status(without)).job.cost
    assert costs[1.0] > costs[0.5] > costs[0.05] > 0
    assert one > 0
    refused = await client.post("/generate", json={**body, "strength": 0.04})
    assert refused.status_code == 422
    assert refused.json()["errors"] == [
        {
            "field": "strength",
            "value": "0.04",
            "accepted": "a number from 0.05 to 1 with 20 steps, so that one of them is left",
        }
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"strength": 0.5}, "strength"),
        ({"mask_image": base64_of(written(halves()))}, "mask_image"),
        ({"init_image": base64_of(written(halves())), "strength": 0}, "strength"),
        ({"init_image": base64_of(written(halves())), "strength": 1.1}, "strength"),
        ({"init_image": base64_of(written(halves())), "resize_mode": "tile"}, "resize_mode"),
        ({"init_image": "https://example.com/cat.png"}, "init_image"),
        ({"init_image": base64_of(written(halves())), "mask_image": "Z2FyYmFnZQ=="}, "mask_image"),
        ({"init_image": ["a"]}, "init_image"),
    ],
    ids=str,
)
async def test_a_wrong_field_is_named_and_nothing_of_a_picture_is_shown(
    client: httpx.AsyncClient, queue: JobQueue, fields: dict[str, Any], field: str
) -> None:
    reply = await client.post("/generate", json={**FOX, **fields})
    assert reply.status_code == 422
    assert [error["field"] for error in reply.json()["errors"]] == [field]
    assert "iVBOR" not in reply.text
    assert "Z2Fy" not in reply.text
    assert (await queue.stats()).counters["accepted"] == 0


async def test_only_a_body_with_a_picture_may_be_large(client: httpx.AsyncClient) -> None:
    noise = base64_of(written(Image.effect_noise((200, 200), 90)))
    assert 20_000 < len(noise) < 190_000
    assert (await client.post("/generate", json={**FOX, "init_image": noise})).status_code == 200
    for body in ({**FOX, "negative_prompt": noise}, {**FOX, "init_image": noise * 9}):
        reply = await client.post("/generate", json=body)
        assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")


async def test_an_idempotency_key_knows_the_picture(
    client: httpx.AsyncClient, queue: JobQueue, settings: Settings
) -> None:
    content = written(halves())
    asked: dict[str, Any] = {**FOX, "mode": "async", "strength": 0.9}
    headers = {"Idempotency-Key": "one"}

    async def post(init_image: str) -> httpx.Response:
        return await client.post("/generate", json={**asked, "init_image": init_image}, headers=headers)

    first = await post(base64_of(content))
    again = await post(f"data:image/png;base64,{base64_of(content)}")
    assert first.json()["job_id"] == again.json()["job_id"]
    other = await post(base64_of(written(halves(left=(0, 0, 0)))))
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    # What came with the requests that made no job is gone.
    assert not await queue._connection.command("KEYS", f"{Keys(settings.shard).prefix}staged:*")


async def test_the_openapi_document_knows_the_fields(client: httpx.AsyncClient) -> None:
    schema = json.loads((await client.get("/openapi.json")).text)["components"]["schemas"]["GenerateRequest"]
    assert {"init_image", "mask_image", "strength", "resize_mode"} <= set(schema["properties"])
