"""How many CPU threads torch uses, said for one Python thread."""

from __future__ import annotations

import torch


def use_cpu_threads(count: int) -> None:
    """Give torch `count` CPU threads on the calling thread.

    torch copies the last count set anywhere into each thread at that thread's first operation, and would overwrite what
    was set here before it; so the copying is provoked first. Only one thread of a process should have more than one:
    with a second team, OpenMP puts idle threads to sleep at once, and each operation waits for a wake-up.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)
