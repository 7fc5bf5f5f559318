"""`GET /v1/models`: what `model` may be."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from darkroom.api.body import describe
from darkroom.api.openai.shapes import Model, ModelList, documented_here
from darkroom.api.service import service_of
from darkroom.errors import UnknownModel

router = APIRouter()

_HEADERS = {"Cache-Control": "no-store"}
_EXAMPLE = {"id": "emoji-world", "object": "model", "created": 0, "owned_by": "darkroom"}


@router.get(
    "/v1/models",
    summary="The models that are served (OpenAI)",
    response_class=Response,
    responses={
        200: {
            "description": "All models.",
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/ModelList"},
                    "example": {"object": "list", "data": [_EXAMPLE]},
                }
            },
        },
        **documented_here("queue_unavailable"),
    },
)
async def models(request: Request) -> Response:
    reply = ModelList(data=[Model(id=name) for name in await _names(request)])
    return Response(msgspec.json.encode(reply), headers=_HEADERS, media_type="application/json")


@router.get(
    "/v1/models/{model:path}",
    summary="One model (OpenAI)",
    response_class=Response,
    responses={
        200: {
            "description": "The model.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Model"}, "example": _EXAMPLE}},
        },
        **documented_here("unknown_model", "queue_unavailable"),
    },
)
async def model(
    request: Request, model: Annotated[str, Path(description="Its id.", examples=["emoji-world"])]
) -> Response:
    names = await _names(request)
    if model not in names:
        raise UnknownModel("model", describe(model), f"one of {', '.join(names)}")
    return Response(msgspec.json.encode(Model(id=model)), headers=_HEADERS, media_type="application/json")


async def _names(request: Request) -> list[str]:
    """The models that are served, and other names of theirs."""
    service = service_of(request)
    offered = (await service.queue.cards()).offered
    aliases = {alias for alias, model in service.settings.models_by_alias.items() if model in offered}
    return sorted({*offered, *aliases})
