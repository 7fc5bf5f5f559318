"""Accidents by the hundred, rolling restarts, or minutes of load, on real processes. `tests/chaos/README.md` tells what
each figure means. The last line sums up, and the exit status is 0 if all is well."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import structlog

from benchmarks.record import Figure, record
from tests.chaos import soak
from tests.chaos.campaign import CHECKPOINT_S, LEASE_S, ROWS, Campaign
from tests.chaos.stack import Stack

SETTINGS: dict[str, Any] = {"lease_s": LEASE_S, "checkpoint_interval_s": CHECKPOINT_S, "reproducible_rows": ROWS}
# A drain takes no lease, so none may run out: here each loss is one too many.
PATIENT = {**SETTINGS, "lease_s": 15.0}


def _say(line: str) -> None:
    print(line, flush=True)


def _record(figures: list[Figure], options: argparse.Namespace) -> None:
    if options.record:
        record(figures)


async def run(directory: Path, options: argparse.Namespace) -> tuple[bool, str]:
    """Whether all is well, and the line that says so."""
    if options.soak_minutes:
        async with Stack(directory, **PATIENT, **soak.SETTINGS) as stack:
            is_well, line, figures = await soak.soak(stack, options.soak_minutes, options.seed, _say)
            _record(figures, options)
            return is_well, line
    if options.rolling_restarts:
        async with Stack(directory, **PATIENT) as stack:
            campaign = Campaign(stack, options.seed, num_workers=2, say=_say)
            verdict, line = await campaign.restarts(options.rolling_restarts)
    else:
        # These kills are not a job's own doing; three in a row are only bad luck.
        async with Stack(directory, max_failures=20, **SETTINGS) as stack:
            campaign = Campaign(stack, options.seed, say=_say)
            verdict, line = await campaign.kills(options.kills)
    _record(campaign.figures, options)
    return bool(verdict) and not campaign.book.failed, line


async def _until_told(directory: Path, options: argparse.Namespace) -> tuple[bool, str]:
    """SIGTERM ends it as Ctrl-C does, with every process that it has started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run(directory, options)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--kills", type=int, default=100, help="kill -9 so many processes (default: 100)")
    kind.add_argument("--rolling-restarts", type=int, default=0, help="restart all processes in turn, so many times")
    kind.add_argument("--soak-minutes", type=float, default=0.0, help="load without accidents")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is random (default: 1)")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    directory = Path(tempfile.mkdtemp(prefix="darkroom-chaos-"))
    is_well, line = asyncio.run(_until_told(directory, options))
    if is_well:
        shutil.rmtree(directory)
    else:
        _say(f"logs: {directory}")
    _say(line)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
