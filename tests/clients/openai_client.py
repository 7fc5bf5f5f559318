"""What an application does with OpenAI's SDK, by the name of the scene; prints what it saw as JSON.

Run by the tests with the Python of an environment of its own: `openai_client.py SCENE PORT KEY`.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
import threading
import zlib
from importlib.metadata import version
from typing import Any

import openai
from openai import OpenAI

PORT = int(sys.argv[2])
KEY = sys.argv[3]


def client(**options: Any) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key=KEY, **options)


def generate() -> dict[str, Any]:
    reply = client().images.generate(
        prompt="a red fox",
        model="test-world",
        n=3,
        size="64x72",
        quality="high",
        output_format="webp",
        output_compression=80,
        extra_body={"seed": 7, "guidance_scale": 2.5, "negative_prompt": "blurry", "sampler": "euler"},
    )
    return {"version": version("openai"), **reply.to_dict(), "request_id": reply._request_id}


def by_environment() -> dict[str, Any]:
    os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{PORT}/v1", "OPENAI_API_KEY": KEY}
    return OpenAI().images.generate(prompt="a red fox", extra_body={"seed": 7}).to_dict()


def stream() -> dict[str, Any]:
    """Each preview is answered by another call, for whoever wants to know how far this is."""
    sdk, seen = client(), []
    extra = {"seed": 7, "steps": 6}
    for event in sdk.images.generate(prompt="a red fox", n=2, stream=True, partial_images=2, extra_body=extra):
        seen.append(event.to_dict())
        if event.type == "image_generation.partial_image":
            sdk.models.list()
    return {"events": seen}


def stream_that_fails() -> dict[str, Any]:
    try:
        list(client().images.generate(prompt="a red fox", stream=True))
    except openai.APIError as error:
        return {"kind": type(error).__name__, "message": error.message, "code": error.code}
    raise AssertionError


def download() -> dict[str, Any]:
    sdk = client()
    reply = sdk.images.generate(prompt="a red fox", response_format="url", extra_body={"seed": 7})
    url = reply.data[0].url
    path = url.removeprefix(f"http://127.0.0.1:{PORT}/")
    assert path != url
    root = OpenAI(base_url=f"http://127.0.0.1:{PORT}", api_key=KEY)
    found = root.get(path, cast_to=openai.HttpxBinaryResponseContent)
    return {"url": url, "content": base64.b64encode(found.content).decode()}


def png(alpha: int | None = None) -> bytes:
    """A picture of 2 × 2 pixels, its upper half of this alpha; without any, opaque and red."""
    upper, lower = ((255, 0, 0, alpha), (255, 0, 0, 255)) if alpha is not None else ((255, 0, 0),) * 2
    rows = b"".join(b"\0" + bytes(row) * 2 for row in (upper, lower))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 6 if alpha is not None else 2, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
              for name, data in parts]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def edit() -> dict[str, Any]:
    """With one file, and with a list of one; with a mask, and without."""
    sdk = client()
    seed = {"seed": 7}
    masked = sdk.images.edit(
        image=("../../etc/passwd", png()), mask=("mask.png", png(alpha=0)), prompt="a hat", size="64x64", n=2,
        quality="low", output_format="webp", extra_body=seed,
    )  # fmt: skip
    plain = sdk.images.edit(image=[png()], prompt="a hat", input_fidelity="high", size="64x64", extra_body=seed)
    stream = sdk.images.edit(image=png(), prompt="a hat", stream=True, size="64x64", extra_body=seed)
    return {
        "masked": masked.to_dict(), "plain": plain.to_dict(), "events": [event.to_dict() for event in stream],
    }  # fmt: skip


def vary() -> dict[str, Any]:
    return client().images.create_variation(image=png(), n=2, size="64x64", extra_body={"seed": 7}).to_dict()


def models() -> dict[str, Any]:
    sdk = client()
    return {"all": [model.to_dict() for model in sdk.models.list()], "one": sdk.models.retrieve("test-world").to_dict()}


def refused() -> dict[str, Any]:
    """Each error by what led to it: its class, and what it says. Retries would be seen as many calls."""
    sdk = client(max_retries=0)
    stranger = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="dk_nobody", max_retries=0)
    calls = {
        "key": lambda: stranger.models.list(),
        "model": lambda: sdk.images.generate(prompt="a fox", model="dall-e-3"),
        "unknown": lambda: sdk.models.retrieve("dall-e-3"),
        "size": lambda: sdk.images.generate(prompt="a fox", size="64x65"),
        "n": lambda: sdk.images.generate(prompt="a fox", n=11),
        "format": lambda: sdk.images.generate(prompt="a fox", output_format="gif"),
        "background": lambda: sdk.images.generate(prompt="a fox", background="transparent"),
        "field": lambda: sdk.images.generate(prompt="a fox", extra_body={"hires": True}),
        "address": lambda: sdk.get("/embeddings", cast_to=object),
        "method": lambda: sdk.get("/images/generations", cast_to=object),
        "image": lambda: sdk.images.edit(image=b"GIF89a", prompt="a fox"),
        "images": lambda: sdk.images.edit(image=[png(), png()], prompt="a fox"),
        "markup": lambda: sdk.images.edit(image=png(), markup=png(), prompt="a fox"),
        "large": lambda: sdk.images.generate(prompt="a" * 3000),
    }
    return {name: told_by(call) for name, call in calls.items()}


def failed() -> dict[str, Any]:
    return told_by(lambda: client().images.generate(prompt="a fox"))


def told_by(call: Any) -> dict[str, Any]:
    try:
        call()
    except openai.APIStatusError as error:
        return {
            "kind": type(error).__name__,
            "status": error.status_code,
            "param": error.param,
            "code": error.code,
            "type": error.type,
            "message": error.message,
            "should_retry": error.response.headers.get("x-should-retry"),
            "request_id": error.request_id,
        }
    raise AssertionError


def retry() -> dict[str, Any]:
    """Gives up waiting after a second, and calls again by itself."""
    return client(timeout=1.0, max_retries=4).images.generate(prompt="a red fox").to_dict()


def two_retries() -> dict[str, Any]:
    """Two callers ask for the same at once."""
    seen: list[dict[str, Any]] = []
    callers = [threading.Thread(target=lambda: seen.append(retry())) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return {"seen": seen}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
