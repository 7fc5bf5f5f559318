"""Other people's clients, each in a virtual environment of its own: what one pins must not move what another gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"


def client_python(name: str) -> Path:
    """The Python of an environment with what `tests/clients/<name>.txt` lists, made on the first run and kept.

    Where that cannot be had a test skips, and fails in CI.
    """
    directory = ROOT / ".venv-clients" / name
    python, done = directory / "bin" / "python", directory / "installed"
    requirements = CLIENTS / f"{name}.txt"
    wanted = f"{sys.version}\n{requirements.read_text()}"
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "-r", requirements]
        installed = subprocess.run(pip, capture_output=True, text=True, timeout=300)
        if installed.returncode:
            reason = f"{name} cannot be installed: {installed.stderr[-300:]}"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        done.write_text(wanted)
    return python
