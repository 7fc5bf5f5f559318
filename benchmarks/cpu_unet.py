"""The UNet on a CPU: ours, ours compiled, diffusers', diffusers' compiled.

`python -m benchmarks.cpu_unet [--dtypes fp32 bf16] [--rows 1 2 8 32] [--seconds 4] [--record]`. The sides take turns
call by call with the built-in weights at their own size, and the fastest call of each counts: a busy machine only ever
adds time. Each compile takes a minute; ours is one library for all row counts, diffusers' is compiled for each.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from darkroom.config import BUILTIN_MODEL
from darkroom.diffusion.compiled import Library, compile_library, load_unet, random_inputs
from darkroom.diffusion.text import load_tokenizer

from benchmarks.record import record

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 8, 32])
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each row count, compiling aside")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--without-compiled-diffusers", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    length = int(load_tokenizer(BUILTIN_MODEL / "tokenizer").model_max_length)
    figures = []
    print(
        f"built-in UNet, {arguments.threads} threads; milliseconds of the fastest call, and how many times ours that is"
    )
    for name in arguments.dtypes:
        sides = Sides(DTYPES[name], length, max(arguments.rows), not arguments.without_compiled_diffusers)
        print(f"  {name}: compiled in {sides.compile_s:.0f} s to {sides.library_mib:.1f} MiB", flush=True)
        figures.append((f"CPU UNet {name}, darkroom compiled, time to compile", sides.compile_s, "s"))
        figures.append((f"CPU UNet {name}, darkroom compiled, library", sides.library_mib, "MiB"))
        for num_rows in arguments.rows:
            fastest = sides.measure(num_rows, arguments.seconds)
            ours = fastest["darkroom"]
            cells = (f"{side} {s * 1e3:7.2f} ({s / ours:.2f}x)" for side, s in fastest.items())
            print(f"  {name} {num_rows:2d} rows   " + "   ".join(cells), flush=True)
            for side, s in fastest.items():
                figures.append((f"CPU UNet {name} {num_rows} rows, {side}", s * 1e3, "ms"))
    if arguments.record:
        record(figures, "diffusers")


class Sides:
    """The networks of one dtype, and their calls for a number of rows."""

    def __init__(self, dtype: torch.dtype, length: int, max_rows: int, compiles_diffusers: bool) -> None:
        self.ours = load_unet(BUILTIN_MODEL, dtype)
        side = self.ours.config.sample_size
        assert side is not None
        self.sizes = {"height": side, "width": side, "length": length, "max_rows": max_rows}
        plain = load_unet(BUILTIN_MODEL, dtype, is_plain=True)
        with tempfile.TemporaryDirectory() as directory:
            began_s = time.perf_counter()
            compile_library(plain, Path(directory) / "unet.so", **self.sizes)
            self.compile_s = time.perf_counter() - began_s
            self.library_mib = (Path(directory) / "unet.so").stat().st_size / 2**20
            self.library = Library(Path(directory) / "unet.so", **self.sizes)
        theirs = diffusers.UNet2DConditionModel.from_pretrained(BUILTIN_MODEL / "unet", torch_dtype=dtype)
        self.theirs = theirs.to(memory_format=torch.channels_last)
        self.compiled_theirs = torch.compile(self.theirs, dynamic=False) if compiles_diffusers else None

    @torch.no_grad()
    def measure(self, num_rows: int, seconds: float) -> dict[str, float]:
        """Seconds of the fastest call of each side, which take turns for `seconds`, and at least five times."""
        inputs = random_inputs(self.ours, num_rows, self.sizes["height"], self.sizes["width"], self.sizes["length"])
        text = torch.randn(num_rows, self.sizes["length"], self.ours.config.text_dim).to(self.ours.dtype)
        timesteps = torch.full((num_rows,), 500)
        calls: dict[str, Callable[[], object]] = {
            "darkroom": lambda: self.ours(*inputs),
            "darkroom compiled": lambda: self.library(*inputs),
            "diffusers": lambda: self.theirs(inputs[0], timesteps, text),
        }
        compiled = self.compiled_theirs
        if compiled is not None:
            calls["diffusers compiled"] = lambda: compiled(inputs[0], timesteps, text)
        # As everywhere torch.compile is used on frozen weights on a CPU.
        with torch._inductor.config.patch(freezing=True):
            for call in calls.values():
                call()
        fastest = dict.fromkeys(calls, float("inf"))
        began_s, rounds = time.perf_counter(), 0
        while rounds < 5 or time.perf_counter() - began_s < seconds:
            for name, call in calls.items():
                started_s = time.perf_counter()
                call()
                fastest[name] = min(fastest[name], time.perf_counter() - started_s)
            rounds += 1
        return fastest


if __name__ == "__main__":
    main()
