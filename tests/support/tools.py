"""Programs that some tests run and that a machine may lack."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """The path of a program: this environment's own, else the one on PATH. Without it a test skips, and fails in CI."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        reason = f"{name} is not installed; tests/system-packages.sh and the extra `dev` name what tests use"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found
