"""Schemathesis against the whole OpenAPI document: calls that it allows, and calls that it does not.

`python -m tests.support.api_fuzzer --cases 100000` serves an API with a worker that draws nothing. It ends at
the first fault, with schemathesis' exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import sys
import tempfile
from pathlib import Path

import structlog
from darkroom.config import Settings
from darkroom.queue import EmbeddedRedis, JobQueue

from tests.support.clients import client_python
from tests.support.http import served
from tests.support.instant_worker import InstantWorker

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
# 504 is what a client gets whose own deadline has passed.
CONFIG = """\
[checks]
not_a_server_error = { expected-statuses = ["2xx", "3xx", "4xx", 504] }
"""
# These streams end when their reader leaves.
ENDLESS = ("/batch",)
CASES_PER_ROUND = 300


async def fuzz(port: int, *, cases_per_call: int, seed: int, directory: Path) -> tuple[int, str]:
    """Let schemathesis invent so many calls of each route, besides those that follow from the document. Returns its
    exit code and what it said; `directory` is for its files."""
    python = await asyncio.to_thread(client_python, "schemathesis")
    config = directory / "schemathesis.toml"
    config.write_text(CONFIG)
    options = [
        f"--checks={','.join(CHECKS)}",
        "--phases=examples,coverage,fuzzing",
        f"--max-examples={cases_per_call}",
        f"--seed={seed}",
        "--request-timeout=20",
        "--suppress-health-check=all",
        "--warnings=off",
        *(f"--exclude-path={path}" for path in ENDLESS),
    ]
    process = await asyncio.create_subprocess_exec(
        python.parent / "schemathesis",
        f"--config-file={config}",
        *("run", f"http://127.0.0.1:{port}/openapi.json", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=directory,
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


async def _main(cases: int, seed: int, directory: Path) -> int:
    """Round by round with seeds that follow, as simple calls soon have no further cases under one."""
    done = 0
    with EmbeddedRedis(Settings(data_dir=directory, redis_url=None)) as server:
        settings = Settings(data_dir=directory, redis_url=server.url)
        queue = await JobQueue.connect(settings, server.url)
        try:
            async with InstantWorker(queue).running(), served(settings, queue) as site:
                while done < cases:
                    code, said = await fuzz(site.port, cases_per_call=CASES_PER_ROUND, seed=seed, directory=directory)
                    done += num_cases(said)
                    if code and not is_its_own(said):
                        print(said)
                        return code
                    if code:
                        print(f"seed {seed}: schemathesis could make no further calls of one route", flush=True)
                    print(f"seed {seed}: no fault in {done} cases", flush=True)
                    seed += 1
        finally:
            await queue.close()
    return 0


def is_its_own(said: str) -> bool:
    """Whether what went wrong is schemathesis' own: every call that it made passed, and then it could make no more.

    It meets "Unsupported type: 'Binary'" where it joins a form's file with other parts while it thinks of a call.
    """
    made = re.findall(r"(\d+) generated, (\d+) passed", said)
    only_errors = "Runtime Error" in said and "FAILURES" not in said and "Unsupported type: 'Binary'" in said
    return only_errors and bool(made) and all(generated == passed for generated, passed in made)


def num_cases(said: str) -> int:
    """How many calls schemathesis says that it made."""
    return sum(map(int, re.findall(r"(\d+) generated", said)))


if __name__ == "__main__":
    # Requests that are none are uvicorn's to complain of.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="darkroom-fuzz-") as directory:
        sys.exit(asyncio.run(_main(arguments.cases, arguments.seed, Path(directory))))
