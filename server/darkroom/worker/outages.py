"""Redis is away now and then: what a worker repeats is asked for again after the pause that the error names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from darkroom.errors import QueueUnavailable

log = structlog.get_logger("darkroom.worker")


async def pause(error: QueueUnavailable) -> None:
    log.warning("queue_unavailable", reason=str(error), retry_in_s=error.retry_after_s)
    await asyncio.sleep(error.retry_after_s)


async def every(interval_s: float, action: Callable[[], Awaitable[Any]]) -> None:
    """Do it for ever, an interval apart, and at once when Redis is back: a lease may be about to end."""
    while True:
        try:
            await action()
        except QueueUnavailable as error:
            await pause(error)
        else:
            await asyncio.sleep(interval_s)


async def until_answered(action: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Repeat until Redis answers. Every action used here is harmless when done twice."""
    while True:
        try:
            return await action()
        except QueueUnavailable as error:
            await pause(error)
