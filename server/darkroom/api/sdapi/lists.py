"""What there is: samplers, schedulers, checkpoints, what a picture says of itself; and lists of what there is not."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from darkroom.api.body import read_json
from darkroom.api.sdapi.names import AUTOMATIC, SAMPLER_ALIASES, SCHEDULE_ALIASES, sha256_of, title_of
from darkroom.api.sdapi.shapes import documented_here, json_body, json_content, json_reply, parse_lenient
from darkroom.api.service import service_of
from darkroom.infotext import SAMPLER_LABELS, SIGMA_SCHEDULE_LABELS, parse, short_hash

router = APIRouter()
_ERRORS = documented_here("queue_unavailable", "internal")

# GET addresses that clients ask and that have nothing to tell here, with what they expect to read then.
NOTHING: dict[str, Any] = {
    "upscalers": [],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
    "loras": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "script-info": [],
    "extensions": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "scripts": {"txt2img": [], "img2img": []},
    "cmd-flags": {},
    "memory": {"ram": {}, "cuda": {}},
}
# POST addresses that ask to look for new files: workers say themselves what they serve.
NOTHING_TO_DO = ("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings")


def _list_of(example: Any) -> dict[str, Any]:
    return json_content([example], {"type": "array", "items": {"type": "object"}})


@router.get(
    "/sdapi/v1/samplers",
    summary="Samplers of the models that are served (AUTOMATIC1111)",
    response_class=Response,
    responses={
        200: {"description": "Samplers.", **_list_of({"name": "Euler", "aliases": ["k_euler"], "options": {}})},
        **_ERRORS,
    },
)
async def samplers(request: Request) -> Response:
    offered = (await service_of(request).queue.cards()).offered.values()
    names = [name for name in SAMPLER_LABELS if any(name in card.samplers for card in offered)]
    return json_reply(
        [{"name": SAMPLER_LABELS[name], "aliases": SAMPLER_ALIASES[name], "options": {}} for name in names]
    )


def _scheduler(name: str, label: str, aliases: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"name": name, "label": label, "aliases": aliases, "default_rho": -1.0, "need_inner_model": False}


@router.get(
    "/sdapi/v1/schedulers",
    summary="Sigma schedules (AUTOMATIC1111)",
    response_class=Response,
    responses={
        200: {"description": "Schedulers.", **_list_of(msgspec.to_builtins(_scheduler("karras", "Karras")))},
        **_ERRORS,
    },
)
async def schedulers(request: Request) -> Response:
    ours = [_scheduler(name, label, SCHEDULE_ALIASES[name]) for name, label in SIGMA_SCHEDULE_LABELS.items()]
    return json_reply([_scheduler(AUTOMATIC, "Automatic"), *ours])


@router.get(
    "/sdapi/v1/sd-models",
    summary="Models that are served (AUTOMATIC1111)",
    response_class=Response,
    responses={
        200: {
            "description": "Models.",
            **_list_of(
                {
                    "title": "emoji-world [9b2f6c1d0e]",
                    "model_name": "emoji-world",
                    "hash": "9b2f6c1d0e",
                    "sha256": "9b2f6c1d0e7a4c35",
                    "filename": "emoji-world",
                    "config": None,
                }
            ),
        },
        **_ERRORS,
    },
)
async def sd_models(request: Request) -> Response:
    cards = (await service_of(request).queue.cards()).offered.values()
    return json_reply(
        [
            {
                "title": title_of(card),
                "model_name": card.id,
                "hash": short_hash(card.weights_hash),
                "sha256": sha256_of(card),
                "filename": card.id,
                "config": None,
            }
            for card in cards
        ]
    )


class PngInfo(BaseModel):
    """`image` is a PNG, JPEG or WebP in base64, or a data URL of one."""

    model_config = ConfigDict(extra="allow", frozen=True)

    image: str = Field(min_length=1)


@router.post(
    "/sdapi/v1/png-info",
    summary="What a picture says of how it was made (AUTOMATIC1111)",
    response_class=Response,
    openapi_extra=json_body(PngInfo, {"image": "iVBORw0KGgoAAAANSUhEUgAA..."}),
    responses={
        200: {
            "description": "`info` is the text, `parameters` what it says, `items` all texts.",
            **json_content(
                {
                    "info": "a horse\nSteps: 20, Sampler: Euler, Seed: 7, Size: 64x64",
                    "items": {"parameters": "a horse\nSteps: 20, Sampler: Euler, Seed: 7, Size: 64x64"},
                    "parameters": {"Prompt": "a horse", "Negative prompt": "", "Steps": "20", "Sampler": "Euler"},
                },
                {"type": "object"},
            ),
        },
        **documented_here(
            "malformed_json", "request_timeout", "body_too_large", "unsupported_media_type", "invalid_request",
            "internal",
        ),
    },
)  # fmt: skip
async def png_info(request: Request) -> Response:
    service = service_of(request)
    body = parse_lenient(PngInfo, await read_json(request, service.settings.max_image_bytes))
    texts = await service.intake.read_texts(body.image)
    text = texts.get("parameters", "")
    found = parse(text)
    parameters = {"Prompt": found.prompt, "Negative prompt": found.negative_prompt, **found.values} if text else {}
    if "x" in (size := parameters.pop("Size", "")):
        parameters["Size-1"], _, parameters["Size-2"] = size.partition("x")
    return json_reply({"info": text, "items": texts, "parameters": parameters})


def _tell(reply: Any) -> Any:
    async def told() -> Response:
        return json_reply(reply)

    return told


for _name, _reply in NOTHING.items():
    router.add_api_route(
        f"/sdapi/v1/{_name}",
        _tell(_reply),
        summary=f"There are no {_name} (AUTOMATIC1111)",
        response_class=Response,
        responses={200: {"description": "Nothing.", **json_content(_reply, {})}},
    )
for _name in NOTHING_TO_DO:
    router.add_api_route(
        f"/sdapi/v1/{_name}",
        _tell({}),
        methods=["POST"],
        summary="Nothing to do (AUTOMATIC1111)",
        response_class=Response,
        responses={200: {"description": "Nothing was done.", **json_content({}, {})}},
    )
