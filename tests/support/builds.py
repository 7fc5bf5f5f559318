"""Builds of every Triton kernel for devices that are not here, and what the machine code of each looks like.

`python -m tests.support.builds` prints the report as JSON. It is a process of its own, because a kernel that was
defined under the interpreter cannot be built.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from darkroom_kernels.backend import Build

KERNELS = Path(__file__).parents[2] / "kernels"
NUM_PROCESSES = 2
# Tensor-core instructions of Ampere, Hopper and Blackwell.
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(frozen=True)
class Built:
    """Resources of one build. A byte of stack or of local memory is a spilled register. `has_narrow_tf32`: whether it
    has a product of tf32 on Hopper whose result is 8 columns wide."""

    name: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    has_products: bool
    products: tuple[str, ...]
    has_narrow_tf32: bool
    most_stack_bytes: int


def kernel_modules() -> list[str]:
    """Dotted names of the modules that list their builds."""
    paths = sorted(path for path in KERNELS.rglob("*.py") if "\ndef builds(" in path.read_text())
    return [".".join(path.relative_to(KERNELS).with_suffix("").parts) for path in paths]


@functools.cache
def all_builds() -> list[tuple[Build, int]]:
    """Each build with each device it is for."""
    listed = [build for module in kernel_modules() for build in importlib.import_module(module).builds()]
    return [(build, capability) for build in listed for capability in build.capabilities]


def build_one(index: int) -> Built:
    """Build number `index` of `all_builds`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    build, capability = all_builds()[index]
    names = build.kernel.arg_names
    even = [name for name, kind in build.signature.items() if kind[0] in "*iu" and name not in build.uneven]
    source = ASTSource(
        build.kernel,
        dict(build.signature),
        {(names.index(name),): value for name, value in build.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(build.options))
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([cuobjdump, "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout[:1000]
    registers, stack, local = map(int, found.groups())
    products = tuple(name for name in PRODUCTS if re.search(rf"\b{name}\b", done.stdout))
    has_narrow_tf32 = re.search(r"\bHGMMA\.64x8x8\.F32\.TF32\b", done.stdout) is not None
    return Built(
        build.name,
        capability,
        registers,
        stack + local,
        compiled.metadata.shared,
        build.has_products,
        products,
        has_narrow_tf32,
        build.most_stack_bytes,
    )


@functools.cache
def report() -> list[Built]:
    """Build everything, once a session, in processes without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.builds"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=KERNELS.parent, env=environment)
    assert done.returncode == 0, done.stderr
    return [Built(**{**row, "products": tuple(row["products"])}) for row in json.loads(done.stdout)]


if __name__ == "__main__":
    # Listed before the fork: kernels cannot be sent to another process.
    numbers = range(len(all_builds()))
    with multiprocessing.get_context("fork").Pool(NUM_PROCESSES) as pool:
        built = pool.map(build_one, numbers, chunksize=1)
    json.dump([asdict(one) for one in built], sys.stdout)
