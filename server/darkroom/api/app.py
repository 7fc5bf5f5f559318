"""The application: routes, error replies, what wraps every call, and the OpenAPI document."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from darkroom import __version__, metrics, tracing
from darkroom.api import batch, generate, health, jobs, page, problems, schema
from darkroom.api.auth import Guard
from darkroom.api.observe import Observe
from darkroom.api.openai import images as openai_images
from darkroom.api.openai import models as openai_models
from darkroom.api.openai import shapes as openai_shapes
from darkroom.api.problems import Problem, problem_of, respond, respond_to
from darkroom.api.sdapi import control, lists, pictures, shapes
from darkroom.api.service import Service
from darkroom.config import Settings
from darkroom.errors import DarkroomError
from darkroom.queue import JobQueue

# Asked every few seconds by machines.
_NOT_TRACED = ("/health/", "/metrics")
_EXPOSED_HEADERS = (
    "Content-Location", "Darkroom-Job-Id", "Darkroom-Seed", "Location", "RateLimit", "RateLimit-Policy", "Retry-After",
    "Retry-After-Ms", "X-Request-Id", "X-Should-Retry",
)  # fmt: skip
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(settings: Settings, queue: JobQueue | None = None) -> FastAPI:
    """Build the application. Without a `queue` it connects to `settings.redis_url` when it starts, and for as long as
    Redis is away its work routes answer 503.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service: Service = app.state.service
        async with service.watching():
            yield

    app = FastAPI(
        title="Darkroom",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # /docs is ours: FastAPI's page loads its script from a CDN
        redoc_url=None,
        redirect_slashes=False,
        # Of its own telemetry only the span of a call: its logs would hold what clients send.
        telemetry={
            "tracing": tracing.provider() is not None,
            "tracer_provider": tracing.provider(),
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": lambda scope: scope["path"].startswith(_NOT_TRACED),
        },
    )
    app.state.service = Service(settings, queue)
    problems.SHAPES[shapes.PREFIX] = shapes.error_reply
    problems.SHAPES[openai_shapes.PREFIX] = openai_shapes.error_reply
    for surface in (generate, jobs, batch, health, page, pictures, control, lists, openai_images, openai_models):
        app.include_router(surface.router)
    if settings.metrics_public:
        app.add_api_route("/metrics", health.exposed_metrics, include_in_schema=False)
    app.add_middleware(Guard)
    if settings.allowed_origins:
        # Outside of the guard: a browser's preflight carries no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "X-API-Key", "Idempotency-Key", "Last-Event-ID", "X-Request-Id"),
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(Observe, is_for_other_sites=bool(settings.allowed_origins))
    app.add_exception_handler(DarkroomError, _on_darkroom_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _on_darkroom_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, DarkroomError):
        raise error
    metrics.REJECTS.labels(error.code).inc()
    return respond_to(error, request.url.path)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException) or error.status_code not in _HTTP_CODES:
        raise error
    code = _HTTP_CODES[error.status_code]
    metrics.REJECTS.labels(code).inc()
    allowed = (error.headers or {}).get("Allow")
    detail = f"this address takes {allowed}" if allowed else "see /docs for the addresses there are"
    return respond(problem_of(code, detail), request.url.path, error.headers)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's paths, and the schemas of the structs that replies are made of."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=generate.DESCRIPTION,
        routes=app.routes,
        summary="Prompts in, pictures out.",
    )
    replies = [schema.Generated, schema.Accepted, schema.JobView, schema.Models, schema.Ready, schema.Live, Problem]
    replies += [shapes.Pictures, shapes.Progress, shapes.WebUIError]
    replies += [openai_shapes.Images, openai_shapes.PartialImage, openai_shapes.CompletedImage]
    replies += [openai_shapes.Model, openai_shapes.ModelList, openai_shapes.OpenAIError]
    _, components = msgspec.json.schema_components(replies, ref_template="#/components/schemas/{name}")
    bodies: list[type[BaseModel]] = [schema.GenerateRequest, shapes.TextToImage, shapes.ImageToImage, lists.PngInfo]
    bodies += [openai_shapes.ImagesGenerate, openai_shapes.ImagesEdit]
    bodies += [openai_shapes.ImagesEditForm, openai_shapes.ImagesVariationForm]
    _, requests = models_json_schema(
        [(kind, "validation") for kind in bodies],
        ref_template="#/components/schemas/{model}",
    )
    document["components"] = {
        "schemas": {**requests["$defs"], **components},
        "securitySchemes": {
            "key": {"type": "http", "scheme": "bearer", "description": "Where the server asks for it."}
        },
    }
    document["security"] = [{}, {"key": []}]
    examples = schema.examples()
    for operations in document["paths"].values():
        for operation in operations.values():
            for reply in operation["responses"].values():
                content = reply.get("content", {}).get("application/json", {})
                name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
                if name in examples:
                    content["example"] = examples[name]
            # FastAPI adds its own 422 to routes with parameters; ours are strings that cannot fail there.
            content = operation["responses"].get("422", {}).get("content", {}).get("application/json", {})
            if content.get("schema", {}).get("$ref") == "#/components/schemas/HTTPValidationError":
                del operation["responses"]["422"]
    app.openapi_schema = document
    return document
