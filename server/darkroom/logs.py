"""Logs: one line an event on stderr, for people on a terminal, as JSON elsewhere.

Prompts are the users' own and not logged unless asked for: fields that would carry one are dropped, and tracebacks show
no local variables.
"""

from __future__ import annotations

import logging
import os
import sys
import zlib
from contextlib import suppress
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_PROMPTS = ("prompt", "negative_prompt")
_WHOLE_REQUESTS = ("request", "body")
_LABEL_COLOURS = ("\x1b[36m", "\x1b[35m", "\x1b[34m", "\x1b[33m", "\x1b[32m")
_RESET = "\x1b[0m"


class _Output:
    """stderr, except that a terminal or pipe that has gone never stops the process that logs."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


class _NamedLogger(structlog.WriteLogger):
    def __init__(self, output: _Output, name: str) -> None:
        super().__init__(cast(TextIO, output))
        self.name = name


def configure(level: str, *, process: str, with_prompts: bool = False) -> None:
    """Send structlog's and the standard library's logs of this process to stderr.

    `level` is the least severe one written; `process` labels every line. Fields that hold a prompt are
    dropped, unless `with_prompts`. May be called again.
    """
    output = _Output(sys.stderr)
    threshold = logging.getLevelName(level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.processors.add_log_level,
        _without(_WHOLE_REQUESTS if with_prompts else _PROMPTS + _WHOLE_REQUESTS),
    ]
    render = _console(process) if sys.stderr.isatty() else _json(process)
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda name="darkroom": _NamedLogger(output, name),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.PositionalArgumentsFormatter()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    # Libraries are quiet unless something is wrong; at debug level they say everything.
    root.setLevel(threshold if level == "debug" else max(threshold, logging.WARNING))
    logging.captureWarnings(True)


def _without(private: tuple[str, ...]) -> Processor:
    def drop(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        for field in private:
            event.pop(field, None)
        return event

    return drop


def _json(process: str) -> list[Processor]:
    def add_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("process", process)
        return event

    return [
        add_process,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]


def _console(process: str) -> list[Processor]:
    """Lines behind a label whose colour stays the same for a process."""
    colours = "NO_COLOR" not in os.environ
    label = f"{process:<9}"
    if colours:
        label = f"{_LABEL_COLOURS[zlib.crc32(process.encode()) % len(_LABEL_COLOURS)]}{label}{_RESET}"
    renderer = structlog.dev.ConsoleRenderer(
        colors=colours, pad_event_to=0, pad_level=False, exception_formatter=structlog.dev.plain_traceback
    )

    def labelled(logger: WrappedLogger, method: str, event: EventDict) -> str:
        event.pop("logger", None)
        return f"{label} {renderer(logger, method, event)}"

    return [structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False), labelled]
