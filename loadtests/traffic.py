"""What clients send: the bodies of each mix, good and bad. Knows nothing of Locust."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

Body = dict[str, Any]

# The step counts that people pick, so that a server which batches equal requests finds equal ones.
STEPS = (8, 12, 16, 20, 25, 30)
GUIDANCE_SCALE = 5.0
SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc")
SIZES = ((64, 64), (64, 64), (64, 64), (96, 64), (64, 96))
LONG_SHARE = 0.1

_OBJECTS = ("an astronaut", "a duck", "a cat", "a house", "a rocket", "a penguin", "a frog", "a pizza")
_PLACES = ("in a forest", "at night", "on a beach", "in the snow", "in a desert", "in a city", "under water")


def _body(source: random.Random, **fields: Any) -> Body:
    prompt = f"{source.choice(_OBJECTS)} {source.choice(_PLACES)}"
    return {"prompt": prompt, "seed": source.getrandbits(31), "sampler": "dpmpp_2m", **fields}


def steady(source: random.Random) -> Body:
    """The same work each time: 20 steps with guidance."""
    return _body(source, num_inference_steps=20, guidance_scale=GUIDANCE_SCALE)


def mixed(source: random.Random) -> Body:
    """8 to 30 steps, guidance off for one in four, one sampler, one size: what the peers are compared on."""
    guidance_scale = 1.0 if source.random() < 0.25 else GUIDANCE_SCALE
    return _body(source, num_inference_steps=source.choice(STEPS), guidance_scale=guidance_scale)


def varied(source: random.Random) -> Body:
    """`mixed`, with any sampler and three sizes."""
    width, height = source.choice(SIZES)
    return {**mixed(source), "sampler": source.choice(SAMPLERS), "width": width, "height": height}


def long_tail(source: random.Random) -> Body:
    """Quick pictures, and one in ten requests for two pictures of 100 steps."""
    if source.random() < LONG_SHARE:
        return _body(source, num_inference_steps=100, guidance_scale=GUIDANCE_SCALE, num_images_per_prompt=2)
    return _body(source, num_inference_steps=source.choice((8, 12)), guidance_scale=GUIDANCE_SCALE)


def is_long(body: Body) -> bool:
    """Whether a body of `long_tail` is one of its long ones."""
    return "num_images_per_prompt" in body


def quick(source: random.Random) -> Body:
    """The cheapest picture there is."""
    return _body(source, num_inference_steps=1, guidance_scale=1.0)


class BadCall(NamedTuple):
    """A call that must be refused: its bytes, their declared type, and the one status that says why."""

    name: str
    content: bytes
    status: int
    content_type: str = "application/json"


def _bad(name: str, status: int = 422, **fields: Any) -> BadCall:
    return BadCall(name, json.dumps({"prompt": "a duck", **fields}).encode(), status)


BAD_CALLS = (
    BadCall("no JSON", b'{"prompt": ', 400),
    BadCall("not UTF-8", b'{"prompt": "\xff\xfe"}', 400),
    BadCall("an array", b"[1, 2, 3]", 422),
    BadCall("nested too deeply", b"[" * 200_000, 400),
    BadCall("a number of thousands of digits", b'{"prompt": "a duck", "seed": ' + b"9" * 5000 + b"}", 400),
    BadCall("another media type", b"prompt=duck", 415, "application/x-www-form-urlencoded"),
    BadCall("no prompt", b"{}", 422),
    BadCall("a body of 2 MiB", json.dumps({"prompt": "x" * (2 << 20)}).encode(), 413),
    _bad("an unknown field", steps=20),
    _bad("a model that is not there", 404, model="no-such-model"),
    _bad("a sampler that is not there", sampler="magic"),
    _bad("a billion steps", num_inference_steps=10**9),
    _bad("no steps", num_inference_steps=0),
    _bad("a million pictures", num_images_per_prompt=10**6),
    _bad("a picture of terapixels", width=10**6, height=10**6),
    _bad("guidance beyond all bounds", guidance_scale=1e300),
    _bad("a negative seed", seed=-1),
    _bad("a prompt of 100,000 characters", prompt="duck " * 20_000),
)
