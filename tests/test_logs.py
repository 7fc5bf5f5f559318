"""Log lines: structured off a terminal, readable on one, and never a prompt."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

SCRIPT = """
import logging, warnings
import structlog
from darkroom import logs

logs.configure("info", process="worker-3")
log = structlog.get_logger("darkroom.test")
log.debug("too_fine")
log.info("job_claimed", job_id="1f", prompt="a secret fox", negative_prompt="secret", request={"prompt": "secret"})
logging.getLogger("library").info("chatter")
logging.getLogger("library").warning("careful with %s", "that")
warnings.warn("old", DeprecationWarning, stacklevel=1)
try:
    secret_local = "secret"
    raise RuntimeError("broken")
except RuntimeError:
    log.exception("unexpected_error")
"""


def run(stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", SCRIPT], stderr=stderr, env={**os.environ, "NO_COLOR": "1"}
    )


def test_off_a_terminal_each_line_is_a_json_object_without_prompts() -> None:
    _, err = run(subprocess.PIPE).communicate(timeout=30)
    lines = [json.loads(line) for line in err.splitlines()]
    assert "secret" not in err.decode()
    assert [(line["level"], line["event"].split("\n")[0]) for line in lines[:2]] == [
        ("info", "job_claimed"),
        ("warning", "careful with that"),
    ]
    assert lines[0]["job_id"] == "1f"
    assert all(line["process"] == "worker-3" and "timestamp" in line for line in lines)
    assert [line["logger"] for line in lines] == ["darkroom.test", "library", "py.warnings", "darkroom.test"]
    assert "DeprecationWarning: old" in lines[2]["event"]
    assert "RuntimeError: broken" in lines[3]["exception"]


def test_on_a_terminal_lines_are_labelled_and_readable() -> None:
    ours, theirs = pty.openpty()
    try:
        process = run(theirs)
        assert process.wait(timeout=30) == 0
        text = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    first = text.splitlines()[0]
    assert first.startswith("worker-3 ")
    assert first.endswith("[info] job_claimed job_id=1f")
    assert "RuntimeError: broken" in text
    assert "secret" not in text
