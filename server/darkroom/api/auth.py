"""Who calls, and may they: asked once for every call, before any route sees it."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from darkroom import metrics
from darkroom.api.body import describe
from darkroom.api.page import STATIC_PATHS
from darkroom.api.problems import respond_to
from darkroom.api.service import service_of
from darkroom.config import Settings
from darkroom.errors import DarkroomError, Forbidden, InvalidRequest, RateLimited, Unauthorized
from darkroom.jobs import Priority
from darkroom.queue import SCOPES, ApiKey, Rate

# All that may be had without a key: what probes ask, and the page, which then asks for one.
OPEN_PATHS = frozenset({"/", "/health/live", "/health/ready", *STATIC_PATHS})
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_ADMIN_PATHS = ("/metrics", "/admin/")


@dataclass(frozen=True)
class Caller:
    """What a call's key allows. `key_id` is empty where no keys are asked for."""

    key_id: str = ""
    tenant: str = "default"
    permissions: frozenset[str] = SCOPES["admin"]
    weight: float = 1.0
    rate: Rate | None = None
    max_cost: int | None = None
    max_priority: Priority = Priority.HIGH

    @property
    def sees(self) -> str | None:
        """The tenant whose jobs this caller may see and cancel; None is everybody's."""
        return None if "admin" in self.permissions else self.tenant


ANONYMOUS = Caller()


def caller_of(connection: HTTPConnection) -> Caller:
    caller: Caller = connection.state.caller
    return caller


class Guard:
    """Refuse every call without a key that allows it, but for the paths that are open."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request = HTTPConnection(scope)
        try:
            request.state.caller = await _admit(request)
        except DarkroomError as error:
            metrics.REJECTS.labels(error.code).inc()
            reply = respond_to(error, scope["path"])
            if isinstance(error, Unauthorized) and "text/html" in request.headers.get("accept", ""):
                # Somebody opens an address in a browser, which asks for a name and a password on this. What a page
                # fetches must not: the page asks by itself.
                reply.headers["WWW-Authenticate"] = 'Basic realm="darkroom: the password is the key", charset="UTF-8"'
            await reply(scope, receive, send)
            return

        async def with_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and hasattr(request.state, "limits"):
                MutableHeaders(scope=message).update(request.state.limits)
            await send(message)

        await self._app(scope, receive, with_limits)


async def _admit(request: HTTPConnection) -> Caller:
    service = service_of(request)
    method, path = request.scope["method"], request.scope["path"]
    if method not in _SAFE_METHODS:
        _refuse_other_sites(request, service.settings)
    if service.settings.auth == "off" or (path in OPEN_PATHS and method in ("GET", "HEAD")):
        return ANONYMOUS
    token = token_of(request)
    if token is None:
        raise Unauthorized("send a key: Authorization: Bearer dk_...")
    key = await service.queue.api_keys.find(token)
    if key is None:
        raise Unauthorized("there is no such key, or it was revoked or has expired")
    needed = _needed(method, path)
    if needed not in key.permissions:
        raise Forbidden(f"this key's scope is {', '.join(key.scopes)}, and this call needs {needed}")
    return _caller(key)


def _refuse_other_sites(request: HTTPConnection, settings: Settings) -> None:
    """A page of another site can send a form from its visitor's browser, with the key that the browser remembers, or to
    a server that asks for none; browsers say so. Raises `Forbidden`."""
    if request.headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return
    if not {"*", request.headers.get("origin")} & set(settings.allowed_origins):
        raise Forbidden("web pages of other sites may call only if DARKROOM_CORS_ORIGINS names them")


def token_of(request: HTTPConnection) -> str | None:
    """The key that a call shows: `Authorization: Bearer`, HTTP Basic (as its password) or `X-API-Key`. An empty value
    counts as none."""
    scheme, _, value = request.headers.get("authorization", "").strip().partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value:
        return value
    if scheme.lower() == "basic" and value:
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    if scheme:
        return ""
    return request.headers.get("x-api-key") or None


def _needed(method: str, path: str) -> str:
    if path.startswith(_ADMIN_PATHS):
        return "admin"
    return "read" if method in ("GET", "HEAD") else "generate"


def _caller(key: ApiKey) -> Caller:
    return Caller(
        key_id=key.id,
        tenant=key.tenant,
        permissions=key.permissions,
        weight=key.weight,
        rate=key.rate,
        max_cost=key.max_cost,
        max_priority=key.max_priority,
    )


async def take_call(request: Request) -> None:
    """Count a call that makes pictures against its key's rate: once, at best before any of its body is read. Whatever
    the reply is, it then says what is left. Raises `RateLimited`."""
    caller = caller_of(request)
    if caller.rate is None or hasattr(request.state, "limits"):
        return
    rate = caller.rate
    taken = await service_of(request).queue.api_keys.take(caller.key_id, rate)
    request.state.limits = {
        "RateLimit-Policy": f'"calls";q={rate.count};w={rate.period_s}',
        "RateLimit": f'"calls";r={taken.remaining};t={round(taken.reset_s)}',
    }
    if not taken.is_allowed:
        raise RateLimited(
            f"this key may make {rate.count} calls in {rate.period_s} s, and {rate.burst} at once",
            retry_after_s=taken.retry_after_s,
        )


def check_caller(caller: Caller, *, priority: Priority, cost: float) -> None:
    """Refuse a job that its key may never ask for. Raises `InvalidRequest`."""
    if priority.rank > caller.max_priority.rank:
        allowed = ", ".join(one.value for one in Priority if one.rank <= caller.max_priority.rank)
        raise InvalidRequest("priority", describe(priority.value), f"one of {allowed} with this key")
    if caller.max_cost is not None and cost > caller.max_cost:
        raise InvalidRequest(
            "cost",
            int(cost),
            f"at most {caller.max_cost} model rows × evaluations × latent pixels with this key; "
            "ask for fewer images, fewer steps or a smaller size",
        )
