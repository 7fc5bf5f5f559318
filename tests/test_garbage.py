"""Cyclic garbage in a process that has many objects which never go."""

from __future__ import annotations

import subprocess
import sys

# Calls that last a while, so that their objects are old when they become garbage, and are left in cycles.
CALLS = """
import collections, sys
from darkroom.garbage import spare_what_is_there

class Call:
    num_alive = 0

    def __init__(self):
        self.itself = self
        Call.num_alive += 1

    def __del__(self):
        Call.num_alive -= 1

kept = [[] for _ in range(2_000_000)]
if sys.argv[1] == "spared":
    spare_what_is_there()
running, most = collections.deque(maxlen=20_000), 0
for _ in range(300_000):
    running.append(Call())
    most = max(most, Call.num_alive - len(running))
print(most)
"""


def most_garbage(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", CALLS, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


def test_garbage_goes_soon_however_much_start_up_has_made() -> None:
    assert most_garbage("not spared") > 200_000, "there is nothing to be cured"
    assert most_garbage("spared") < 120_000
