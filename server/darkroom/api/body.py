"""From the bytes of a request to a checked model: the cap, the JSON or form, the fields, a word for each mistake."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from darkroom.api.problems import InvalidFields
from darkroom.errors import InvalidRequest, RequestError
from darkroom.jobs import INPUT_NAMES

# A client that sends too much is read on, up to this many times the usual cap, so that it gets to see the 413 instead
# of a reset connection.
_DISCARD_FACTOR = 16
_BODY_TIMEOUT_S = 30.0
_MAX_ERRORS = 16
_MAX_PARTS = 64
FORM = "multipart/form-data"
# Longer than any prompt that may be allowed.
_LONGEST_SHOWN = 40_000

# Names that other servers use for our fields.
_OTHER_NAMES = {
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "n": "num_images_per_prompt",
    "num_images": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "cfg_scale": "guidance_scale",
    "cfg": "guidance_scale",
    "sampler_name": "sampler",
    "scheduler": "sampler",
    "format": "output_format",
    "response_format": "output_format",
    "size": "width and height",
    "timeout": "wait_timeout_s",
    "deadline": "deadline_s",
    "image": "init_image",
    "init_images": "init_image",
    "mask": "mask_image",
    "denoising_strength": "strength",
}

Body = TypeVar("Body", bound=BaseModel)


async def read_json(request: Request, max_bytes: int, *, max_image_bytes: int = 0) -> dict[str, Any]:
    """Read a JSON object, never holding more than `max_bytes` of it, or than `max_image_bytes` where it brings a
    picture: more than the first is accepted from an object with a field that stands for one.

    Raises `RequestError` with code `unsupported_media_type`, `body_too_large`, `request_timeout`, `malformed_json` or
    `invalid_request` (not an object, or a key given twice).
    """
    body = await _body(request, "application/json", max(max_bytes, max_image_bytes), max_bytes)
    if len(body) <= max_bytes:
        return parse_json(body)
    try:
        fields = parse_json(body)
    except RequestError as error:
        raise _too_large(max_bytes) from error
    if not any(name in fields for name in INPUT_NAMES):
        raise _too_large(max_bytes)
    return fields


async def read_form(request: Request, max_bytes: int) -> list[tuple[str, str | bytes]]:
    """Read a multipart form of at most `max_bytes`: names with texts, or with the bytes of files, whose own names and
    types are dropped. All of it stays in memory.

    Raises `RequestError` as `read_json` does, and `InvalidRequest` for a form that is none.
    """
    body = await _body(request, FORM, max_bytes, max_bytes)

    async def whole() -> AsyncGenerator[bytes]:
        yield body

    parser = MultiPartParser(
        request.headers, whole(), max_files=_MAX_PARTS, max_fields=_MAX_PARTS, max_part_size=max_bytes
    )
    parser.spool_max_size = max_bytes
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError) as error:
        raise InvalidRequest("body", Described("a form that cannot be read"), f"{FORM} with a boundary") from error
    try:
        return [(name, value if isinstance(value, str) else await value.read()) for name, value in form.multi_items()]
    finally:
        await form.close()


def is_form(request: Request) -> bool:
    return _media_type(request) == FORM


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _body(request: Request, media_type: str, max_bytes: int, discard_bytes: int) -> bytes:
    """The whole body, in time, of the type that it must have."""
    if _media_type(request) != media_type:
        sent = request.headers.get("content-type", "")
        shown = repr(sent[:60]) if sent else "none"
        raise RequestError(f"the Content-Type must be {media_type}, got {shown}", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("the body must not be compressed (Content-Encoding)", code="unsupported_media_type")
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await _read(request, max_bytes, discard_bytes)
    except TimeoutError as error:
        raise RequestError(
            f"the body did not arrive within {_BODY_TIMEOUT_S:g} seconds", code="request_timeout"
        ) from error


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the body is larger than {max_bytes} bytes", code="body_too_large")


async def _read(request: Request, max_bytes: int, discard_bytes: int) -> bytes:
    """The body; of one that is larger than `max_bytes` the rest is read and dropped, within reason."""
    too_large = _too_large(max_bytes)
    declared = request.headers.get("content-length", "")
    oversized = declared.isdecimal() and int(declared[:20]) > max_bytes
    if oversized and "100-continue" in request.headers.get("expect", ""):
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes + discard_bytes * _DISCARD_FACTOR:
                break
            if size > max_bytes:
                oversized = True
            if not oversized:
                chunks.append(chunk)
    except ClientDisconnect as error:
        raise RequestError("the body broke off", code="malformed_json") from error
    if oversized:
        raise too_large
    return b"".join(chunks)


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse one JSON object. Any bytes at all end in a dict or a `RequestError`."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _malformed(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise _malformed("it is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise _malformed("a number has too many digits") from error
    if not isinstance(value, dict):
        raise InvalidRequest(
            "body", describe(value), 'a JSON object, such as {"prompt": "an astronaut riding a horse"}'
        )
    return value


def _malformed(reason: str) -> RequestError:
    return RequestError(f"the body is not JSON: {reason}", code="malformed_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, value in pairs:
            if name in seen:
                raise InvalidRequest(safe_name(name), describe(value), "each name only once in an object")
            seen.add(name)
    return fields


def parse_fields(kind: type[Body], fields: dict[str, Any], accepted: dict[str, str]) -> Body:
    """Check `fields` against `kind`. Raises `InvalidFields` naming every wrong one.

    `accepted` says for each field in words what would be right.
    """
    known = list(kind.model_fields)
    problems = [
        InvalidRequest(safe_name(name), describe(value), _hint(name, known))
        for name, value in fields.items()
        if name not in kind.model_fields
    ]
    try:
        model = kind.model_validate({name: value for name, value in fields.items() if name in kind.model_fields})
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            name = str(item["loc"][0])
            value = Missing() if item["type"] == "missing" else describe(item["input"])
            problems.append(InvalidRequest(name, value, accepted[name]))
    else:
        if not problems:
            return model
    raise InvalidFields(problems[:_MAX_ERRORS])


class Missing:
    """Stands for a value that was not sent, in error messages."""

    def __repr__(self) -> str:
        return "nothing"


class Described:
    """Stands for a value that is better described than shown, in error messages."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __repr__(self) -> str:
        return self._words


def describe(value: object) -> object:
    """The value itself, or a word for it where writing it out could recurse or take long."""
    if isinstance(value, dict):
        return Described("an object")
    if isinstance(value, list):
        return Described("an array")
    if isinstance(value, str):
        # A picture, most likely, under another name or where none belongs.
        return value[:100] if len(value) <= _LONGEST_SHOWN else Described(f"a text of {len(value)} characters")
    if isinstance(value, int) and not -(10**40) < value < 10**40:
        return Described("an integer of more than 40 digits")
    return value


def safe_name(name: str) -> str:
    """A field name of the client's, fit to be shown: printable ASCII, at most 64 characters."""
    return ascii(name[:64])[1:-1][:64]


def _hint(name: str, known: list[str]) -> str:
    nearest = _OTHER_NAMES.get(name.lower())
    if nearest is None:
        matches = difflib.get_close_matches(name[:64].lower(), known, n=1, cutoff=0.6)
        nearest = matches[0] if matches else None
    if nearest is not None:
        return f"no field of that name; did you mean {nearest}?"
    return f"one of the fields {', '.join(known)}"
