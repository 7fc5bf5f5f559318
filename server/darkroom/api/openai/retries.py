"""OpenAI's SDK calls again where a call broke off, and sends no key to know it by, only the number of the try.

So each of its calls gets a key of its own, and one that was refused, or whose client has left, leaves that key for a
later try of the same body to take. Calls that merely ask for the same never meet, and no two tries take up the same
job.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets

from starlette.requests import Request

from darkroom.api.auth import caller_of
from darkroom.api.generate import idempotency_key
from darkroom.api.service import service_of
from darkroom.errors import QueueUnavailable

_TRY = "x-stainless-retry-count"


class Retries:
    """What a call may be repeated by. `asked` is a hash of its body."""

    def __init__(self, request: Request, asked: str) -> None:
        self._service = service_of(request)
        self._own = idempotency_key(request)
        self._try = request.headers.get(_TRY)
        who = f"{caller_of(request).tenant}\n{request.url.path}\n{asked}"
        self._asked = hashlib.sha256(who.encode()).hexdigest()
        self._key: str | None = None

    async def key(self) -> str | None:
        """The idempotency key of this call: the client's, that of an earlier try, or a fresh one. None for a client
        that does not repeat its calls."""
        if self._own is not None or self._try is None:
            return self._own
        if self._try != "0":
            self._key = await self._service.queue.left_calls.take(self._asked)
        self._key = self._key or secrets.token_hex(16)
        return self._key

    async def leave(self, retry_after_s: float = 0.0) -> bool:
        """The client may be back with another try, this late at least. False if it will not, or not be known again."""
        if self._key is None:
            return self._own is not None
        with contextlib.suppress(QueueUnavailable):
            kept_s = self._service.settings.disconnect_grace_s + retry_after_s
            await self._service.queue.left_calls.leave(self._asked, self._key, kept_s=kept_s)
            return True
        return False
