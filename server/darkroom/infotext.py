"""The text that stable-diffusion tools read from a picture's `parameters`, and their names for samplers.

The format is AUTOMATIC1111's: the prompt, a `Negative prompt: ` line when there is one, then one line of
`Key: value` pairs. Plain Python, so that the API can speak it as well as the image writer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from darkroom.jobs import GenerationRequest

SAMPLER_LABELS: dict[str, str] = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
SIGMA_SCHEDULE_LABELS: dict[str, str] = {"simple": "Simple", "karras": "Karras", "exponential": "Exponential"}

_SURROGATES = re.compile("[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which no encoding can hold, by U+FFFD."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)


def short_hash(weights_hash: str) -> str:
    """The first ten digits of a weights hash, with or without an `algorithm:` prefix."""
    return weights_hash.rpartition(":")[2][:10]


def _quoted(value: object) -> str:
    """A value as it stands between commas: JSON-quoted when it holds one of the separators."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search('[,:\n"]', text) else text


def infotext(request: GenerationRequest, index: int, *, model_hash: str, version: str) -> str:
    """Describe image `index` of a request; its seed is `request.seed + index`.

    `model_hash` is the model card's weights hash, `version` Darkroom's. Lone surrogates become U+FFFD and NULs are left
    out, because the chunks this text goes into cannot hold them. `Clip skip` counts as those tools do: 1 leaves no
    layer out; `Emphasis: None` tells them that brackets are text.
    """
    values: dict[str, object] = {
        "Steps": request.num_inference_steps,
        "Sampler": SAMPLER_LABELS.get(request.sampler, request.sampler),
        "Schedule type": SIGMA_SCHEDULE_LABELS.get(request.sigma_schedule, request.sigma_schedule),
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seed + index,
        "Size": f"{request.width}x{request.height}",
        "Model hash": short_hash(model_hash),
        "Model": request.model,
    }
    if request.init_image:
        values["Denoising strength"] = f"{request.strength:g}"
    if request.clip_skip:
        values["Clip skip"] = request.clip_skip + 1
    if request.prompt_syntax == "plain" and re.search(r"[()\[\]]", request.prompt + request.negative_prompt):
        values["Emphasis"] = "None"
    values["Version"] = f"darkroom {version}"
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in values.items()))
    return without_surrogates("\n".join(lines)).replace("\0", "")


@dataclass(frozen=True)
class Infotext:
    """What a picture's `parameters` say: its prompts, and the other values by the names those tools use."""

    prompt: str
    negative_prompt: str
    values: dict[str, str]


_NEGATIVE = "Negative prompt:"
_NAME = re.compile(r"\w[\w /-]+")
# Fewer values than this on the last line, and it is part of the prompt.
_FEWEST_VALUES = 3


def parse(text: str) -> Infotext:
    """Read what `infotext` or another tool wrote. Any string at all is read; one without values is a prompt."""
    lines = [line.strip() for line in text.strip().split("\n")]
    values = _values(lines[-1])
    if len(values) < _FEWEST_VALUES:
        values = {}
    else:
        lines.pop()
    first = next((index for index, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = [lines[first].removeprefix(_NEGATIVE).strip(), *lines[first + 1 :]] if first < len(lines) else []
    return Infotext("\n".join(lines[:first]), "\n".join(negative), values)


def _values(line: str) -> dict[str, str]:
    """`Key: value` pairs between commas. A value in quotes may hold commas, and quotes after a backslash."""
    values: dict[str, str] = {}
    position = 0
    while (colon := line.find(":", position)) >= 0:
        name = line[position:colon].rpartition(",")[2].strip()
        begin = colon + 1
        while line[begin : begin + 1] == " ":
            begin += 1
        value, end = _quoted_value(line, begin)
        comma = line.find(",", end)
        comma = len(line) if comma < 0 else comma
        if _NAME.fullmatch(name):
            values[name] = line[begin:comma].strip() if value is None else value
        position = comma + 1
    return values


def _quoted_value(line: str, begin: int) -> tuple[str | None, int]:
    """The value in quotes that begins here, and where it ends; None when there is none."""
    if line[begin : begin + 1] == '"':
        try:
            value, end = json.JSONDecoder().raw_decode(line, begin)
        except json.JSONDecodeError:
            return None, begin
        return str(value), end
    return None, begin
