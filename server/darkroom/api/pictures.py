"""Pictures from strangers: what may come in, in which form, and how it is made harmless.

A picture is an upload or a data URL, never an address to fetch. Its format is told by its bytes, among PNG, JPEG and
WebP; its size is read from its header before anything is decoded. What leaves here is a new PNG of the request's size,
so nothing of the file itself goes further: no metadata, no trailing data, no name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import warnings

from PIL import Image, ImageOps

from darkroom.api.body import Described
from darkroom.api.intake import Pictures
from darkroom.errors import InvalidRequest
from darkroom.jobs import INPUT_NAMES

FORMATS = ("PNG", "JPEG", "WEBP")
# Of a JPEG with longer sides, no more is decoded than gives sides of this length.
ENOUGH_PX = 2048
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_STILL = "a still picture: PNG, JPEG or WebP"
_ENCODED = "a picture in base64, by itself or in a data URL (data:image/png;base64,...)"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]{0,20}:", re.IGNORECASE)

# Pillow only warns of a picture that is a little too large for it, and opening one is where ours is refused.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def read_pictures(
    init_image: str | bytes,
    mask_image: str | bytes | None = None,
    *,
    mask_is_alpha: bool = False,
    mask_is_inverted: bool = False,
    max_pixels: int,
) -> Pictures:
    """Read an init image and its mask, each as the bytes of a file, or as base64 or a data URL.

    Transparent parts of an init image turn white. Of a mask white is drawn anew, and what is transparent is kept; with
    `mask_is_alpha` it is the other way about: what is transparent is drawn anew, and colours say nothing. With
    `mask_is_inverted` what would be kept is drawn anew. Raises `InvalidRequest`, whatever the bytes are.
    """
    contents = [
        (name, _content(sent, name))
        for name, sent in zip(INPUT_NAMES, (init_image, mask_image), strict=True)
        if sent is not None
    ]
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name} {len(content)} {mask_is_alpha} {mask_is_inverted}\n".encode() + content)
    opened = {name: _decoded(content, name, max_pixels) for name, content in contents}
    mask = opened.get("mask_image")
    if mask is not None:
        mask = _mask_of_alpha(mask) if mask_is_alpha else _over(mask, _BLACK).convert("L")
        mask = ImageOps.invert(mask) if mask_is_inverted else mask
    return Pictures(_over(opened["init_image"], _WHITE), mask, digest.hexdigest())


def read_texts(image: str) -> dict[str, str]:
    """The texts that a picture in base64, or in a data URL, carries: those of a PNG before its pixels, by keyword, and
    of a JPEG or WebP its EXIF UserComment as `parameters`. No pixel is decoded. Raises `InvalidRequest`."""
    content = _content(image, "image")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            if opened.format == "PNG":
                return {str(name): str(text) for name, text in opened.info.items() if isinstance(text, str)}
            comment = opened.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except Exception as error:
        raise InvalidRequest("image", Described(f"{len(content)} bytes that are none"), _STILL) from error
    text = _comment_text(comment) if isinstance(comment, bytes) else ""
    return {"parameters": text} if text else {}


def _comment_text(comment: bytes) -> str:
    """An EXIF UserComment. Writers differ in the byte order of Unicode, which the standard leaves open."""
    code, text = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        return text.decode("ascii", "replace") if code == b"ASCII\0\0\0" else ""
    # The names of its values are Latin letters, whose high byte is 0.
    is_little = text[1::2].count(0) > text[::2].count(0)
    return text.decode("utf-16-le" if is_little else "utf-16-be", "replace")


def fitted(pictures: Pictures, width: int, height: int, resize_mode: str) -> dict[str, bytes]:
    """The pictures as a job brings them, by name: PNG of `width` × `height` pixels.

    `resize_mode` says what happens to one of other proportions: `stretch` squeezes it, `crop` cuts off what does not
    fit, `fill` continues its edges. Source of the modes: diffusers `VaeImageProcessor.resize`.
    """
    images = {"init_image": pictures.init_image}
    if pictures.mask_image is not None:
        images["mask_image"] = pictures.mask_image
    return {name: _png(_resized(image, (width, height), resize_mode)) for name, image in images.items()}


def _content(sent: str | bytes, name: str) -> bytes:
    """The bytes of a file."""
    if isinstance(sent, bytes):
        return sent
    head, comma, data = sent.partition(",")
    if comma and head.lower().startswith("data:"):
        if not head.lower().endswith(";base64"):
            raise InvalidRequest(name, Described("a data URL without ;base64"), _ENCODED)
    elif _ADDRESS.match(sent):
        scheme = sent[:32].partition(":")[0].lower()
        raise InvalidRequest(name, Described(f"a {scheme}: address"), f"{_ENCODED}; nothing is fetched")
    else:
        data = sent
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(name, Described("no valid base64"), _ENCODED) from error


def _decoded(content: bytes, name: str, max_pixels: int) -> Image.Image:
    """The picture upright, as RGB, or as RGBA where it knows transparency. Raises `InvalidRequest`."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_header(image, name, max_pixels)
            image.draft(None, (ENOUGH_PX, ENOUGH_PX))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _eight_bits(image).convert("RGBA" if image.has_transparency_data else "RGB")
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, max_pixels) from error
    except Exception as error:
        # A file made to confuse a decoder may bring any of a dozen classes out of it.
        raise InvalidRequest(name, Described(f"{len(content)} bytes that are none"), _STILL) from error


def _check_header(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, max_pixels)
    # A camera's file may hold further pictures for other displays (MPO); the first one is the photograph.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise InvalidRequest(name, Described("an animation"), _STILL)


def _too_large(name: str, max_pixels: int) -> InvalidRequest:
    return InvalidRequest(name, Described("a larger picture"), f"at most {max_pixels} pixels")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen bits of grey become eight; Pillow would cut them off at 255."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return image


def _over(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """A picture in front of a plain colour, as RGB."""
    if image.mode == "RGB":
        return image
    flat = Image.new("RGB", image.size, colour)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def _mask_of_alpha(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        raise InvalidRequest(
            "mask_image", Described("a picture without transparency"), "one whose transparent part is new"
        )
    return ImageOps.invert(image.getchannel("A"))


def _resized(image: Image.Image, size: tuple[int, int], resize_mode: str) -> Image.Image:
    if image.size == size:
        return image
    if resize_mode == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if resize_mode == "fill":
        return _filled(image, size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _filled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image`, made as wide or as high as `size`, in the middle of its own continued edges."""
    (width, height), scale = size, min(size[0] / image.width, size[1] / image.height)
    own_width, own_height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize((own_width, own_height), Image.Resampling.LANCZOS)
    left, top = (width - own_width) // 2, (height - own_height) // 2
    whole = Image.new(image.mode, size)
    edges = (
        ((0, 0, own_width, 1), (0, 0, width, top)),
        ((0, own_height - 1, own_width, own_height), (0, top + own_height, width, height)),
        ((0, 0, 1, own_height), (0, 0, left, height)),
        ((own_width - 1, 0, own_width, own_height), (left + own_width, 0, width, height)),
    )
    for edge, (x, y, right, bottom) in edges:
        if right > x and bottom > y:
            whole.paste(image.crop(edge).resize((right - x, bottom - y)), (x, y))
    whole.paste(image, (left, top))
    return whole


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    # Nothing that the file has said of itself goes along.
    Image.frombytes(image.mode, image.size, image.tobytes()).save(out, "PNG", compress_level=1)
    return out.getvalue()
