"""Errors as RFC 9457 problem documents: the only place where an error becomes bytes for a client."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from darkroom.errors import (
    HTTP_STATUS,
    DarkroomError,
    DeadlineUnmet,
    InvalidRequest,
    RequestError,
    Unauthorized,
    Unavailable,
    UnknownModel,
)

MEDIA_TYPE = "application/problem+json"

TITLES: dict[str, str] = {
    "unauthorized": "The call needs a key",
    "forbidden": "The key does not allow this",
    "invalid_request": "A field of the request is wrong",
    "prompt_refused": "This server's rules forbid the prompt",
    "malformed_json": "The body is not valid JSON",
    "body_too_large": "The body is too large",
    "request_timeout": "The body did not arrive in time",
    "not_found": "There is nothing at this address",
    "method_not_allowed": "This address does not take that method",
    "not_acceptable": "The reply cannot have the form that was asked for",
    "unsupported_media_type": "The body must be JSON",
    "unknown_model": "No worker serves that model",
    "job_not_found": "There is no such job",
    "image_not_found": "There is no such image",
    "job_not_finished": "The job has not ended yet",
    "idempotency_mismatch": "The idempotency key belongs to another request",
    "rate_limited": "The key has made too many calls",
    "budget_exceeded": "The key has too much work unfinished",
    "queue_full": "The queue is full",
    "tenant_queue_full": "Your share of the queue is full",
    "deadline_unmet": "The job would be done after its deadline",
    "storage_full": "The result store is full",
    "no_model": "No worker is ready",
    "queue_unavailable": "The queue cannot be reached",
    "not_replicated": "The job is not safe yet",
    "storage_unavailable": "The result store cannot be reached",
    "unavailable": "The service cannot take requests now",
    "draining": "This server is shutting down",
    "internal": "Something went wrong on our side",
    "job_failed": "The job failed",
    "bad_message": "A stored message could not be read",
    "dead_letter": "The job was given up after repeated failures",
    "prompt_too_long": "A prompt with weights has too many tokens",
    "non_finite": "The picture came out as numbers that are not finite",
    "out_of_memory": "The device ran out of memory",
    "cancelled": "The job was cancelled",
    "expired": "The job's deadline passed before it was finished",
}


class FieldError(msgspec.Struct, frozen=True):
    """One wrong field: its dotted path, what was sent (shortened) and what would have been right."""

    field: str
    value: str
    accepted: str


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An RFC 9457 problem document. `code` is stable; `detail` is for people.

    `job_id` is there when the error concerns a job that was accepted; `health` only on `/health/ready`.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[FieldError] = []
    job_id: str | None = None
    health: str | None = None


class InvalidFields(RequestError):
    """Several fields of a request are wrong at once; `fields` holds one `InvalidRequest` for each."""

    code = "invalid_request"

    def __init__(self, fields: Sequence[InvalidRequest]) -> None:
        self.fields = list(fields)
        super().__init__("; ".join(str(field) for field in fields))


def problem_of(code: str, detail: str, *, errors: Sequence[InvalidRequest] = (), **extra: str | None) -> Problem:
    """Build the document. An unknown `code` (of a newer worker) is shown as `job_failed`."""
    if code not in HTTP_STATUS:
        code = "job_failed"
    return Problem(
        type=f"/docs#error-{code}",
        title=TITLES[code],
        status=HTTP_STATUS[code],
        detail=detail,
        code=code,
        errors=[FieldError(error.field, error.value, error.accepted) for error in errors],
        **extra,
    )


# How surfaces that follow another API write an error, by the prefix of their addresses.
SHAPES: dict[str, Callable[[Problem], Response]] = {}


def respond(problem: Problem, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """The reply to a call of `path`, in the form that its surface's clients read."""
    for prefix, shape in SHAPES.items():
        if path.startswith(prefix):
            reply = shape(problem)
            reply.headers.update(headers or {})
            return reply
    return Response(msgspec.json.encode(problem), problem.status, headers, media_type=MEDIA_TYPE)


def respond_to(error: DarkroomError, path: str, *, health: str | None = None) -> Response:
    """The reply to a call of `path` for an error raised on purpose, with `Retry-After` where trying again makes
    sense."""
    fields: Sequence[InvalidRequest] = ()
    if isinstance(error, InvalidRequest):
        fields = [error]
    elif isinstance(error, InvalidFields):
        fields = error.fields
    elif isinstance(error, DeadlineUnmet):
        fields = [error.reason]
    headers: dict[str, str] = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        # OpenAI's clients look here first.
        headers["Retry-After-Ms"] = str(math.ceil(error.retry_after_s * 1000))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="darkroom"'
    if error.code in ("body_too_large", "request_timeout"):
        headers["Connection"] = "close"  # the rest of the body is still on its way
    problem = problem_of(error.code, str(error), errors=fields, job_id=error.job_id, health=health)
    return respond(problem, path, headers)


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` entries for error codes, one example each, grouped by status."""
    responses: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status = HTTP_STATUS[code]
        if status not in responses:
            content = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
            responses[status] = {"description": "", "content": {MEDIA_TYPE: content}}
        entry = responses[status]
        entry["description"] = "; ".join(filter(None, [entry["description"], TITLES[code]]))
        example = problem_of(code, _EXAMPLE_DETAILS.get(code, f"{TITLES[code]}."), errors=_EXAMPLE_ERRORS.get(code, ()))
        entry["content"][MEDIA_TYPE]["examples"][code] = {"value": msgspec.to_builtins(example)}
        if status in (429, 503):
            entry["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
    return responses


_EXAMPLE_ERRORS: dict[str, Sequence[InvalidRequest]] = {
    "invalid_request": [InvalidRequest("num_inference_steps", 0, "an integer from 1 to 200")],
    "unknown_model": [UnknownModel("model", "sd15", "one of emoji-world")],
    "deadline_unmet": [InvalidRequest("deadline_s", 2.0, "at least 14.2")],
}
_EXAMPLE_DETAILS = {
    "invalid_request": "num_inference_steps: got 0, expected an integer from 1 to 200",
    "unknown_model": "model: got 'sd15', expected one of emoji-world",
    "malformed_json": "the body is not JSON: Expecting ',' delimiter at line 1 column 17",
    "body_too_large": "the body is larger than 1048576 bytes",
    "rate_limited": "this key may make 60 calls in 60 s, and 60 at once",
    "budget_exceeded": "this key's unfinished jobs cost 900000; 163840 more is above its 1000000",
    "queue_full": "1000 jobs are waiting, which is as many as may wait",
    "tenant_queue_full": "500 jobs of yours are waiting, which is as many as may; others have room",
    "deadline_unmet": "deadline_s: got 2.0, expected at least 14.2",
    "queue_unavailable": "Redis cannot be reached",
    "not_replicated": "the job was written, but 1 of 2 replicas has it: ask again with the same Idempotency-Key",
    "prompt_too_long": "prompt: got 9 chunks of 75 tokens, expected at most 8",
}
