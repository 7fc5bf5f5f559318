"""What the commands share: options, settings, tables, a queue to talk to."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from darkroom.config import Settings
    from darkroom.queue import JobQueue

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_Reply = TypeVar("_Reply")

DataDir = Annotated[Path | None, typer.Option(metavar="PATH", help="Where the private Redis keeps its data.")]
RedisUrl = Annotated[str | None, typer.Option(metavar="URL", help="Redis to use. (default: DARKROOM_REDIS_URL)")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def read_settings(process: str, **overrides: object) -> Settings:
    """Read the settings, options over variables, and start logging under the name that `up` gave this process."""
    from darkroom import logs
    from darkroom.config import load_settings

    settings = load_settings(**{name: value for name, value in overrides.items() if value is not None})
    process = os.environ.get("DARKROOM_PROCESS", process)
    logs.configure(settings.log_level, process=process, with_prompts=settings.log_prompts)
    return settings


def settings_of_redis(process: str, redis_url: str | None, data_dir: Path | None, *, log_level: str) -> Settings:
    """As `read_settings`, for a command that works on a Redis, or on the private one of a data directory."""
    settings = read_settings(process, redis_url=redis_url, data_dir=data_dir, log_level=log_level)
    # A data directory that is named means the private Redis in it, whatever the environment says.
    if data_dir is not None and redis_url is None:
        return settings.model_copy(update={"redis_url": None})
    return settings


def with_queue(redis_url: str | None, data_dir: Path | None, run: Callable[[JobQueue], Awaitable[_Reply]]) -> _Reply:
    """Run something against the queue of a Redis, or of a data directory, whether or not a server runs on it."""
    import asyncio

    settings = settings_of_redis("jobs", redis_url, data_dir, log_level="error")
    from darkroom.queue import JobQueue, redis_of

    async def connected(url: str) -> _Reply:
        queue = JobQueue(settings, url)
        try:
            return await run(queue)
        finally:
            await queue.close()

    with redis_of(settings) as url:
        return asyncio.run(connected(url))


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
