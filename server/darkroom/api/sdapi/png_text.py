"""The texts that a PNG carries beside its picture, read without a decoder: no pixel is touched."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Far more than any text that a picture was made from.
MAX_TEXT_BYTES = 1 << 20


def read_texts(data: bytes) -> dict[str, str]:
    """Texts by keyword, of tEXt, zTXt and iTXt chunks; a damaged chunk is left out. Raises `ValueError` on what is no
    PNG. Source: PNG specification, third edition, 11.3.3."""
    if not data.startswith(SIGNATURE):
        raise ValueError("not a PNG")
    texts: dict[str, str] = {}
    for kind, content in _chunks(data):
        keyword, _, rest = content.partition(b"\0")
        try:
            if kind == b"tEXt":
                texts[keyword.decode("latin-1")] = rest.decode("latin-1")
            elif kind == b"zTXt":
                texts[keyword.decode("latin-1")] = _inflate(rest[1:]).decode("latin-1")
            elif kind == b"iTXt":
                is_compressed, rest = rest[:1] == b"\1", rest[2:]
                _, _, rest = rest.partition(b"\0")
                _, _, rest = rest.partition(b"\0")
                texts[keyword.decode("latin-1")] = (_inflate(rest) if is_compressed else rest).decode()
        except (zlib.error, UnicodeDecodeError):
            continue
    return texts


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(SIGNATURE)
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if kind == b"IEND" or position + 12 + length > len(data):
            return
        if kind in (b"tEXt", b"zTXt", b"iTXt") and length <= MAX_TEXT_BYTES:
            yield kind, data[position + 8 : position + 8 + length]
        position += 12 + length


def _inflate(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, MAX_TEXT_BYTES)
