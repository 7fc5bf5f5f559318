"""The process that compiles: `python -m darkroom.worker.compile_child ORDER`, ORDER being a `CompileOrder` in JSON.

Writes the library and prints a `CompileReport`. Everything is tried here first: what crashes, crashes no worker.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import msgspec
import torch

from darkroom.diffusion.compiled import (
    TOLERANCES,
    Library,
    compile_library,
    largest_difference,
    load_unet,
    random_inputs,
)
from darkroom.diffusion.unet import UNet
from darkroom.worker.compile import CompileOrder, CompileReport

# At 19 a worker that is never idle would starve the compiler; at 10 it leaves it a tenth of a core.
NICENESS = 10
ROUNDS = 30


def main() -> None:
    order = msgspec.json.decode(sys.argv[1], type=CompileOrder)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICENESS)
    torch.set_num_threads(order.num_threads)
    started_s = time.monotonic()
    path, dtype, directory = Path(order.library), getattr(torch, order.dtype), Path(order.directory)
    compile_library(load_unet(directory, dtype, attention=order.attention, is_plain=True), path, **order.sizes)
    seconds = time.monotonic() - started_s
    hand_made = load_unet(directory, dtype, attention=order.attention)
    difference, speedup = compare(hand_made, Library(path, **order.sizes), order)
    report = CompileReport(seconds, difference, difference <= TOLERANCES[dtype], speedup)
    print(msgspec.json.encode(report).decode(), flush=True)


@torch.inference_mode()
def compare(hand_made: UNet, library: Library, order: CompileOrder) -> tuple[float, float]:
    """Largest difference over several row counts, and the speed-up at two rows: fastest of rounds taken in turn."""
    difference = 0.0
    for num_rows in {1, 2, order.max_rows}:
        inputs = random_inputs(hand_made, num_rows, order.height, order.width, order.length)
        difference = max(difference, largest_difference(library(*inputs), hand_made(*inputs)))
    inputs = random_inputs(hand_made, 2, order.height, order.width, order.length)
    times: dict[str, list[float]] = {"hand-made": [], "compiled": []}
    for _ in range(ROUNDS):
        for name, call in (("hand-made", hand_made), ("compiled", library)):
            started_s = time.perf_counter()
            call(*inputs)
            times[name].append(time.perf_counter() - started_s)
        if sum(map(sum, times.values())) > ROUNDS:
            break
    return difference, min(times["hand-made"]) / min(times["compiled"])


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
