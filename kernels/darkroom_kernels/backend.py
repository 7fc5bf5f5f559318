"""What all Triton kernels share: where they can run, how they are launched, registered and built ahead of time.

Triton is imported at the first use, so that a machine without it works. Triton 3.6 to 3.9 are supported.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch._ops import OpOverload

from darkroom_kernels.winners import winner_for

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

LEAST_CAPABILITY = (8, 0)

# Ops live as long as the process; a Library that is collected takes its ops with it.
_library = torch.library.Library("darkroom", "FRAGMENT")
_failed: dict[tuple[str, str], str] = {}
_decisions: list[Callable[[], None]] = []


class Decision(Protocol[P, R_co]):
    """A function that answers a question once; `cache_clear` makes it ask again."""

    _dynamo_marked_constant: bool
    cache_clear: Callable[[], None]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Implementation(str, Enum):
    """Who computes a kernel that has these forms. `auto` picks one; every other name is a demand."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"


class KernelUnavailable(RuntimeError):
    """A named implementation cannot run here; the message says why."""


def decided_once(function: Callable[P, R]) -> Decision[P, R]:
    """Remember each answer, as `functools.cache` does, until `forget_decisions`. torch.compile takes it as a constant,
    instead of warning of the cache and tracing how the answer was found."""
    cached = functools.lru_cache(maxsize=8192)(function)

    @functools.wraps(function)
    def decide(*args: P.args, **kwargs: P.kwargs) -> R:
        return cached(*args, **kwargs)  # type: ignore[arg-type]

    decision = cast(Decision[P, R], decide)
    # What torch.compiler.assume_constant_result sets; calling it would import the compiler, which takes seconds.
    decision._dynamo_marked_constant = True
    decision.cache_clear = cached.cache_clear
    _decisions.append(cached.cache_clear)
    return decision


def forget_decisions() -> None:
    """Decide anew from now on: a table changed, or a kernel failed its check."""
    for clear in _decisions:
        clear()


def interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors. Read by Triton when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _import_problem() -> str | None:
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a broken install fails in many ways, and each is an answer
        return f"the package triton cannot be imported ({type(error).__name__}: {error})"
    return None


@decided_once
def triton_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`; None when they can.

    A fake or meta tensor is never computed on, so for it the package is enough.
    """
    if device.type not in ("cuda", "cpu", "meta"):
        return f"there are kernels for cuda devices, not for {device.type}"
    if device.type == "cpu" and not interprets():
        return "on a CPU the kernels run only in Triton's interpreter, which TRITON_INTERPRET=1 turns on"
    if (problem := _import_problem()) is not None:
        return problem
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return (
                f"the kernels need compute capability 8.0 or newer, and this device has {capability[0]}.{capability[1]}"
            )
    return None


def mark_failed(kernel: str, device: torch.device, reason: str) -> None:
    """Turn `auto` away from a kernel on a kind of device for the life of the process; by name it raises from now on."""
    _failed[kernel, device.type] = reason
    logger.error("kernel %s on %s: %s; it is not used", kernel, device.type, reason)
    forget_decisions()


def failure(kernel: str, device: torch.device) -> str | None:
    """The reason given to `mark_failed`."""
    return _failed.get((kernel, device.type))


E = TypeVar("E", bound=Enum)


def named(kind: type[E], name: str) -> E:
    """The implementation of a name. Raises `ValueError` with those that exist."""
    try:
        return kind(name)
    except ValueError:
        known = [one.value for one in kind]
        raise ValueError(f"implementation {name!r} is unknown, expected one of {known}") from None


@decided_once
def uses_triton(implementation: str, device: torch.device, kernel: str = "", size: int = 0) -> bool:
    """Whether a kernel with the forms of `Implementation` takes its Triton form on `device`.

    "auto" takes it on a CUDA device wherever it can run, unless torch's was measured to be faster at this `size`
    (`winners`), and never on a CPU, where the interpreter is a tool for tests. `kernel` is the name in that table, and
    the one that a failed self-check is recorded under. Raises `KernelUnavailable` when "triton" cannot run and
    `ValueError` on an unknown name.
    """
    chosen = named(Implementation, implementation)
    if chosen is Implementation.TORCH or (chosen is Implementation.AUTO and device.type == "cpu"):
        return False
    problem = triton_problem(device) or failure(kernel, device)
    if problem is None:
        return chosen is Implementation.TRITON or winner_for(kernel, device, size) != "torch"
    if chosen is Implementation.TRITON:
        raise KernelUnavailable(f"{kernel or 'kernel'} 'triton' is unavailable: {problem}")
    logger.warning("%s: torch instead of triton, because %s", kernel or "kernels", problem)
    return False


def launch_options(num_warps: int, num_stages: int = 1, **more: Any) -> dict[str, Any]:
    """Options of a launch or a build. Fusing a·b + c is asked for outright: Triton 3.9 warns about its own default,
    which 3.10 changes."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **more}


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Define `torch.ops.darkroom.<name>` and return it, ready to call.

    `schema` as torch writes it: "name(Tensor x, Tensor(a!) y) -> Tensor", a tensor first. `kernel` runs on CUDA tensors
    and, in the interpreter, on CPU tensors; `fake` returns empty tensors of the right shape, strides and dtype.
    """
    name = schema.partition("(")[0]

    def on_its_device(first: torch.Tensor, *rest: Any) -> Any:
        # Triton launches on the current device, whatever the tensors'.
        if first.get_device() == torch.cuda.current_device():
            return kernel(first, *rest)
        with torch.cuda.device(first.device):
            return kernel(first, *rest)

    _library.define(schema)
    _library.impl(name, on_its_device, "CUDA")
    _library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"darkroom::{name}", fake, lib=_library)
    op: OpOverload = getattr(torch.ops.darkroom, name).default
    return op


@dataclass(frozen=True)
class Build:
    """One specialisation of a Triton kernel: all that a build ahead of time needs.

    `signature`: the type of every argument in order, as Triton writes it ("*fp16", "i32", "fp32", "constexpr").
    `constants`: the value of each constexpr. `options`: from `launch_options`. `uneven`: arguments that are not
    multiples of 16; all other pointers and integers are, as a launch would find them. `has_products`: whether tensor
    cores must appear in the machine code. `most_stack_bytes`: what a thread may keep of its registers in memory. A
    kernel module lists its builds in `builds() -> list[Build]`.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    uneven: frozenset[str] = frozenset()
    has_products: bool = False
    capabilities: tuple[int, ...] = (80, 90, 100)
    most_stack_bytes: int = 0
