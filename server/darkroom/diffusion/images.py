"""Finished pixels to PNG, JPEG or WebP, with the request written into the file.

Each file carries two records. `parameters` is the text other tools read (`darkroom.infotext`); `darkroom` is JSON that
re-makes exactly this picture, and is what `read_parameters` gives back.

| format | `parameters`                        | `darkroom`            |
|--------|-------------------------------------|-----------------------|
| PNG    | tEXt, or iTXt when not Latin-1      | iTXt                  |
| JPEG   | EXIF UserComment, if it fits 64 KiB | COM segments          |
| WebP   | EXIF UserComment                    | EXIF ImageDescription |

Beside them an XMP packet says in IPTC's words that a model made the picture.
"""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from darkroom.infotext import infotext, without_surrogates
from darkroom.jobs import GenerationRequest

_FORMATS = ("png", "jpeg", "webp")
_RECORD_KEY = "darkroom"
_EXIF_IFD, _USER_COMMENT, _IMAGE_DESCRIPTION = 0x8769, 0x9286, 0x010E
_UNICODE = b"UNICODE\0"
# A JPEG segment holds 65533 bytes after its length; each piece of the record repeats a short mark.
_COMMENT_MARK = b"darkroom\0"
_COMMENT_BYTES = 65533 - len(_COMMENT_MARK)
_EXIF_BYTES = 65533

# https://cv.iptc.org/newscodes/digitalsourcetype
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_PNG_XMP_KEY = "XML:com.adobe.xmp"
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def encode_image(
    pixels: NDArray[np.uint8],
    request: GenerationRequest,
    index: int,
    *,
    model_hash: str,
    version: str,
    is_marked: bool = True,
) -> bytes:
    """Compress image `index` of a request in its `output_format`.

    `pixels` `[H, W, 3]` uint8 RGB; `model_hash` is the model card's weights hash, `version` Darkroom's; `is_marked`
    adds the mark of its source. PNG is lossless at level 1, which takes a quarter of the default's time; JPEG and WebP
    have the request's `output_quality`. Raises `ValueError` on another shape, dtype or format.
    """
    output_format = request.output_format
    if output_format not in _FORMATS:
        raise ValueError(f"expected one of {', '.join(_FORMATS)}, got {output_format!r}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"expected uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    text = infotext(request, index, model_hash=model_hash, version=version)
    record = _record(request, index, model_hash=model_hash, version=version)
    xmp = _XMP.encode() if is_marked else b""
    image, out = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if output_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", text)
        chunks.add_itxt(_RECORD_KEY, record)
        if is_marked:
            chunks.add_itxt(_PNG_XMP_KEY, _XMP)
        image.save(out, "PNG", compress_level=1, pnginfo=chunks)
    elif output_format == "jpeg":
        exif = _exif(text)
        # Full-resolution colour: at the usual quality of 95 the bytes saved by halving it show on hard edges.
        image.save(
            out,
            "JPEG",
            quality=request.output_quality,
            subsampling=0,
            exif=exif if len(exif) <= _EXIF_BYTES else b"",
            extra=_comment_segments(record.encode()),
            xmp=xmp,
        )
    else:
        image.save(out, "WEBP", quality=request.output_quality, method=0, exif=_exif(text, record), xmp=xmp)
    return out.getvalue()


def decode_input(data: bytes) -> NDArray[np.uint8]:
    """Read a picture as a job brings it: PNG, `[H, W, 3]` uint8 RGB or `[H, W, 1]` grey.

    Our own API has written it, so this is no place for strangers' files. Raises `ValueError` on anything else.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode not in ("RGB", "L"):
                raise ValueError(f"expected RGB or grey, got {image.mode}")
            pixels = np.array(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("not a PNG that can be read") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def read_parameters(data: bytes) -> dict[str, Any] | None:
    """Read back what `encode_image` wrote.

    Returns `request` (the fields of `GenerationRequest`, for this one image and with its own seed), `weights_hash` and
    `version`; None when `data` is no picture or carries no such record.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
            record: Any = json.loads(_read_record(image) or "null")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return record if isinstance(record, dict) else None


def _record(request: GenerationRequest, index: int, *, model_hash: str, version: str) -> str:
    alone = msgspec.structs.replace(
        request,
        prompt=without_surrogates(request.prompt),
        negative_prompt=without_surrogates(request.negative_prompt),
        seed=request.seed + index,
        num_images_per_prompt=1,
    )
    record = {"version": version, "weights_hash": model_hash, "request": msgspec.to_builtins(alone)}
    return msgspec.json.encode(record).decode()


def _exif(user_comment: str, description: str | None = None) -> bytes:
    """An EXIF block whose UserComment is UTF-16BE, in a big-endian file so that the byte order is never in doubt."""
    exif = Image.Exif()
    exif.endian = ">"
    if description is not None:
        exif[_IMAGE_DESCRIPTION] = description.encode()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + user_comment.encode("utf-16-be")
    return exif.tobytes()


def _comment_segments(record: bytes) -> bytes:
    pieces = [record[start : start + _COMMENT_BYTES] for start in range(0, len(record), _COMMENT_BYTES)]
    payloads = [_COMMENT_MARK + piece for piece in pieces]
    return b"".join(b"\xff\xfe" + (2 + len(payload)).to_bytes(2, "big") + payload for payload in payloads)


def _read_record(image: Image.Image) -> str | bytes | None:
    if image.format == "PNG":
        value = image.info.get(_RECORD_KEY)
    elif image.format == "WEBP":
        value = image.getexif().get(_IMAGE_DESCRIPTION)
        # EXIF text has no stated encoding; Pillow reads it as Latin-1, which gives the bytes back unchanged.
        value = value.encode("latin-1") if isinstance(value, str) else value
    else:
        segments: list[tuple[str, bytes]] = getattr(image, "applist", [])
        value = b"".join(
            payload.removeprefix(_COMMENT_MARK)
            for marker, payload in segments
            if marker == "COM" and payload.startswith(_COMMENT_MARK)
        )
    return value if isinstance(value, (str, bytes)) else None
