"""Supervision with real children: restarts, orderly ends, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from darkroom.errors import ConfigError
from darkroom.supervisor import Backoff, Service, Spawner, Supervisor

QUICK = Backoff(first_s=0.05, longest_s=0.2, healthy_s=60)
# A child that says it lives, then ends as its first argument orders.
CHILD = """
import pathlib, signal, sys, time
from darkroom.supervisor import die_with_parent
order, marks, name = sys.argv[1:]
if order == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    def end(*_):
        with open(marks, "a") as file: file.write(f"stopped {name}\\n")
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
die_with_parent()
import os
with open(marks, "a") as file: file.write(f"started {name} {os.getpid()}\\n")
if order.startswith("exit"):
    sys.exit(int(order[4:]))
while True:
    time.sleep(10)
"""


class Children:
    """Services made of `CHILD`, and what their lives wrote."""

    def __init__(self, marks: Path) -> None:
        self.marks = marks
        marks.touch()
        self.spawner = Spawner()

    def service(self, name: str, order: str = "stay", stop_rank: int = 0, stop_timeout_s: float = 5.0) -> Service:
        argv = [sys.executable, "-c", CHILD, order, str(self.marks), name]
        return Service(name, lambda: self.spawner.spawn(argv, os.environ), stop_rank, stop_timeout_s)

    def lines(self, word: str) -> list[str]:
        return [line for line in self.marks.read_text().splitlines() if line.startswith(word)]

    def pids(self) -> list[int]:
        return [int(line.split()[2]) for line in self.lines("started")]

    async def wait_started(self, count: int) -> list[int]:
        async def poll() -> None:
            while len(self.lines("started")) < count:  # noqa: ASYNC110 - other processes write it
                await asyncio.sleep(0.01)

        await asyncio.wait_for(poll(), 20)
        return self.pids()


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    children = Children(tmp_path / "marks")
    yield children
    children.spawner.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_gone(pids: list[int], timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < until, "a process was left behind"
        time.sleep(0.01)


async def test_a_killed_service_is_started_again(children: Children) -> None:
    supervisor = Supervisor(QUICK)
    supervisor.add(children.service("worker"))
    (first,) = await children.wait_started(1)
    os.kill(first, signal.SIGKILL)
    _, second = await children.wait_started(2)
    supervisor.stop()
    assert await supervisor.run() == 0
    wait_gone([first, second])


async def test_restarts_back_off_up_to_a_limit(children: Children) -> None:
    supervisor = Supervisor(Backoff(first_s=0.1, longest_s=0.2, healthy_s=60))
    delays: list[float] = []
    slept = supervisor.wait_stop

    async def noted(timeout_s: float) -> bool:
        delays.append(timeout_s)
        return await slept(timeout_s)

    supervisor.wait_stop = noted  # type: ignore[method-assign]
    supervisor.add(children.service("worker", "exit3"))
    await children.wait_started(5)
    supervisor.stop()
    await supervisor.run()
    assert delays[:4] == [0.1, 0.2, 0.2, 0.2]


async def test_a_healthy_life_resets_the_backoff(children: Children) -> None:
    supervisor = Supervisor(Backoff(first_s=0.01, longest_s=30, healthy_s=0))
    supervisor.add(children.service("worker", "exit1"))
    await asyncio.wait_for(children.wait_started(6), 20)
    supervisor.stop()
    await supervisor.run()


async def test_services_stop_in_the_order_of_their_ranks(children: Children) -> None:
    supervisor = Supervisor(QUICK)
    for name, rank in (("redis", 2), ("worker", 1), ("api", 0)):
        supervisor.add(children.service(name, stop_rank=rank))
    pids = await children.wait_started(3)
    supervisor.stop()
    assert await supervisor.run() == 0
    assert children.lines("stopped") == ["stopped api", "stopped worker", "stopped redis"]
    wait_gone(pids)


async def test_a_service_that_ignores_the_stop_is_killed_in_time(children: Children) -> None:
    supervisor = Supervisor(QUICK)
    supervisor.add(children.service("worker", "stubborn", stop_timeout_s=0.2))
    pids = await children.wait_started(1)
    supervisor.stop()
    await asyncio.wait_for(supervisor.run(), 20)
    wait_gone(pids)


async def test_a_second_stop_does_not_wait(children: Children) -> None:
    supervisor = Supervisor(QUICK)
    supervisor.add(children.service("worker", "stubborn", stop_timeout_s=60))
    pids = await children.wait_started(1)
    supervisor.stop()
    ending = asyncio.ensure_future(supervisor.run())
    supervisor.stop()
    await asyncio.wait_for(ending, 20)
    wait_gone(pids)


async def test_a_stop_during_the_start_ends_what_was_started(children: Children) -> None:
    supervisor = Supervisor(QUICK)
    supervisor.add(children.service("worker"))
    supervisor.stop()
    assert await asyncio.wait_for(supervisor.run(), 10) == 0
    wait_gone(children.pids())


async def test_a_refused_configuration_at_the_first_start_ends_everything(children: Children) -> None:
    supervisor = Supervisor(QUICK)
    supervisor.add(children.service("api"))
    supervisor.add(children.service("worker", "exit2"))
    assert await asyncio.wait_for(supervisor.run(), 10) == 2
    wait_gone(children.pids())
    assert sum("worker" in line for line in children.lines("started")) == 1


async def test_after_the_first_start_it_is_restarted_instead(children: Children) -> None:
    supervisor = Supervisor(QUICK)
    supervisor.settle()
    supervisor.add(children.service("worker", "exit2"))
    await children.wait_started(2)
    supervisor.stop()
    assert await supervisor.run() == 0


async def test_a_start_that_raises_a_config_error_is_raised_by_run(children: Children) -> None:
    async def refuse() -> asyncio.subprocess.Process:
        raise ConfigError("the directory is in use")

    supervisor = Supervisor(QUICK)
    supervisor.add(children.service("api"))
    supervisor.add(Service("redis", refuse, stop_rank=1))
    with pytest.raises(ConfigError, match="the directory is in use"):
        await asyncio.wait_for(supervisor.run(), 10)
    wait_gone(children.pids())


async def test_a_fault_of_the_parent_stops_the_children_and_is_raised(children: Children) -> None:
    async def break_down() -> asyncio.subprocess.Process:
        raise FileNotFoundError("no such program")

    supervisor = Supervisor(QUICK)
    supervisor.add(children.service("api"))
    supervisor.add(Service("worker", break_down, stop_rank=1))
    with pytest.raises(FileNotFoundError):
        await asyncio.wait_for(supervisor.run(), 10)
    wait_gone(children.pids())


PARENT = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_supervisor import Children, QUICK
from darkroom.supervisor import Supervisor

async def main():
    children = Children(Path(sys.argv[1]))
    supervisor = Supervisor(QUICK)
    supervisor.handle_signals()
    for name, rank in (("api", 0), ("worker", 1)):
        supervisor.add(children.service(name, stop_rank=rank))
    return await supervisor.run()

sys.exit(asyncio.run(main()))
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    script = textwrap.dedent(PARENT)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "marks"), str(Path(__file__).parent)], start_new_session=True
    )
    yield process
    process.kill()
    process.wait()


async def test_a_killed_parent_takes_its_children_along(parent: subprocess.Popen[bytes], children: Children) -> None:
    pids = await children.wait_started(2)
    assert all(is_alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    wait_gone(pids)
    assert children.lines("stopped") == []


async def test_a_terminals_ctrl_c_reaches_the_parent_alone(parent: subprocess.Popen[bytes], children: Children) -> None:
    """The whole foreground group gets the signal; the children, in sessions of their own, are told by the parent."""
    pids = await children.wait_started(2)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(timeout=10) == 0
    wait_gone(pids)
    assert children.lines("stopped") == ["stopped api", "stopped worker"]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
async def test_pressing_twice_leaves_nothing(
    parent: subprocess.Popen[bytes], children: Children, second: signal.Signals
) -> None:
    pids = await children.wait_started(2)
    parent.send_signal(signal.SIGINT)
    parent.send_signal(second)
    assert parent.wait(timeout=10) == 0
    wait_gone(pids)


async def test_without_a_kernel_signal_the_pipe_ends_the_child(children: Children) -> None:
    """What other systems than Linux rely on: the child ends when the parent's end of the pipe is closed."""
    spawner = Spawner()
    argv = [sys.executable, "-c", CHILD, "stay", str(children.marks), "worker"]
    process = await spawner.spawn(argv, os.environ)
    await children.wait_started(1)
    spawner.close()
    assert await asyncio.wait_for(process.wait(), 20) == 1
