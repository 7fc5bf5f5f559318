"""docker/compose.yaml as its services get it, without Docker."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import redis
import yaml
from darkroom.queue.embedded import find_redis_server
from redis.backoff import ConstantBackoff
from redis.retry import Retry

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<operator>:[-?+])(?P<word>[^}]*))?\}")


def load_compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file with its variables filled in. Raises `KeyError` for a required one that is missing."""

    def fill(match: re.Match[str]) -> str:
        name, operator, word = match["name"], match["operator"], match["word"]
        value = variables.get(name, "")
        if operator == ":+":
            return word if value else ""
        if operator == ":-":
            return value or word
        return variables[name]

    loaded: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(fill, COMPOSE.read_text()))
    return loaded


class ComposeRedis:
    """A redis-server of this machine, run with the command of the `redis` service; on a port of its own."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        self.port = free_port()
        self._password = command[command.index("--requirepass") + 1]
        here = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory)]
        self._command = [find_redis_server(), *command[1:], *here]

    def __enter__(self) -> ComposeRedis:
        self._server = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with self.client() as client:
            client.ping()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.terminate()
        self._server.wait(10)

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A client with the password, that waits for the server to answer."""
        return redis.Redis(port=self.port, password=self._password, retry=Retry(ConstantBackoff(0.05), 200))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
