"""The UNet through torch's compiler: a shared library on a CPU, compiled graphs on CUDA.

The library (AOTInductor with freezing) holds the weights laid out for one latent size and takes any number of rows. It
is called through its C interface (torch `csrc/inductor/aoti_runtime/interface.h`) by ctypes, which lets go of Python's
lock for the length of the call; torch's own loader holds it, and with it everything else in the process.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from darkroom_kernels.bench.timing import time_calls
from torch import Tensor, nn

from darkroom.diffusion.unet import UNet
from darkroom.diffusion.weights import load_weights, read_json, weight_files

log = structlog.get_logger("darkroom.diffusion")

# Largest difference from the hand-made path that is rounding, relative to the largest output.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# How long each side of a trial is timed, and how many texts its rows share.
TRIAL_S = 0.3
TRIED_TEXTS = 4

_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def compiler_problem() -> str | None:
    """Why nothing can be compiled for a CPU here, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch's compiler needs a C++ compiler, and neither g++ nor what CXX names is there"
    return None


def load_unet(directory: Path, dtype: torch.dtype, *, attention: str = "auto", is_plain: bool = False) -> UNet:
    """The UNet of a checkpoint on the CPU. `is_plain` keeps its weights as torch's compiler can read them."""
    config = read_json(directory / "unet" / "config.json")
    with torch.device("meta"):
        unet = UNet(config, attention=attention)
    files = weight_files(directory / "unet", "diffusion_pytorch_model", prefer_fp16=dtype is torch.float16)
    load_weights(unet, files, device=torch.device("cpu"), dtype=dtype)
    return unet.fuse(onednn=not is_plain)


class _Denoiser(nn.Module):
    """The forward pass without its inference mode, in which nothing can be exported."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        self._forward = inspect.unwrap(UNet.forward)

    def forward(self, *inputs: Tensor | None) -> Any:
        return self._forward(self.unet, *inputs)


def random_inputs(
    unet: UNet, num_rows: int, height: int, width: int, length: int, num_texts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, time projection, and keys and values of `num_texts` texts, by default one a row, all in the UNet's
    dtype, from a seed of their own."""
    generator = torch.Generator().manual_seed(num_rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(unet.dtype)

    latents = randn(num_rows, unet.config.in_channels, height, width)
    return (
        latents.contiguous(memory_format=torch.channels_last),
        0.1 * randn(num_rows, unet.time_width),
        randn(num_texts or num_rows, length, unet.text_kv_width),
    )


def export(unet: UNet, inputs: Sequence[Tensor | None], dynamic: tuple[Any, ...] | None = None) -> torch.fx.GraphModule:
    """`UNet.forward` as one graph of torch's operations, for inputs like these; `dynamic` names what may vary of each.

    The layers' own ways of calling each other are run, not read, so the graph has nothing of them.
    """
    with torch.no_grad():
        exported = torch.export.export(
            _Denoiser(unet), tuple(inputs), dynamic_shapes=None if dynamic is None else (dynamic,), strict=False
        )
    return exported.module()


def compile_library(unet: UNet, path: Path, *, height: int, width: int, length: int, max_rows: int) -> None:
    """Write a shared library that computes `unet`, loaded with `is_plain`, to `path`. Takes a minute or more.

    It is for latents of `height` × `width`, texts of `length` tokens and 1 to `max_rows` rows, and always uses as many
    threads as torch does here and now.
    """
    rows = {0: torch.export.Dim("rows", min=1, max=max_rows)}
    inputs = random_inputs(unet, min(8, max_rows), height, width, length)
    options = {"freezing": True, "aot_inductor.output_path": str(path)}
    with torch.no_grad():
        torch._inductor.aot_compile(export(unet, inputs, (rows, rows, rows)), inputs, options=options)


class Library:
    """A loaded library of `compile_library`, made with the same sizes. Called as a UNet.

    Raises `RuntimeError` or `OSError` when it cannot be loaded, and `RuntimeError` from a call that fails.
    """

    def __init__(self, path: Path, *, height: int, width: int, length: int, max_rows: int) -> None:
        self.height, self.width, self.length, self.max_rows = height, width, length, max_rows
        self._library = ctypes.CDLL(str(path))
        self._model = ctypes.c_void_p()
        if self._library.AOTInductorModelContainerCreateWithDevice(
            ctypes.byref(self._model), ctypes.c_size_t(1), b"cpu", None
        ):
            raise RuntimeError("the compiled UNet cannot be set up")

    def fits(self, x: Tensor, text_kv: Tensor, text_lengths: Tensor | None, text_slots: Tensor | None) -> bool:
        return (
            text_lengths is None
            and text_slots is None
            and x.shape[2:] == (self.height, self.width)
            and text_kv.shape[1] == self.length
            and text_kv.shape[0] == x.shape[0] <= self.max_rows
        )

    def __call__(
        self,
        x: Tensor,
        time_projection: Tensor,
        text_kv: Tensor,
        *_: Tensor | None,
    ) -> Tensor:
        # The library takes shapes and strides on trust: these are the ones it was made with.
        inputs = [x.contiguous(memory_format=torch.channels_last), time_projection.contiguous(), text_kv.contiguous()]
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(inputs)
        handles = (ctypes.c_void_p * len(capsules))(*(_pointer_of(capsule, None) for capsule in capsules))
        outputs = (ctypes.c_void_p * 1)()
        if self._library.AOTInductorModelContainerRun(
            self._model, handles, ctypes.c_size_t(len(inputs)), outputs, ctypes.c_size_t(1), None, None
        ):
            raise RuntimeError("the compiled UNet failed")
        return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_new_capsule(outputs[0], None, None))


def compile_graph(unet: UNet, inputs: Sequence[Tensor | None]) -> Callable[..., Tensor]:
    """`UNet.forward` for inputs like these, compiled with torch's search for the fastest kernels."""
    graph: Callable[..., Tensor] = torch.compile(export(unet, inputs), dynamic=False, mode="max-autotune-no-cudagraphs")
    graph(*inputs)
    return graph


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: inside a CUDA graph, on a CPU as it is."""
    return time_calls([call], device, budget_s=TRIAL_S).seconds


@dataclass(frozen=True)
class Trial:
    """A compiled graph beside the hand-made path. `difference` is relative to the largest output, `speedup` over the
    hand-made path; `is_used` when it agrees and is faster.
    """

    rows: int
    seconds: float
    difference: float
    speedup: float
    is_used: bool


class CompiledGraphs:
    """`unet` through `compile`, one graph for each kind of inputs that is met until `close`; others are left alone.

    Meant for a warm-up that runs every bucket before it captures it, so that what it captures is compiled. A graph is
    used only if it computes what the hand-made path does, up to rounding, and faster; `trials` has what was found. Both
    are timed as ticks run: captured where the device has graphs. `close` comes before the first text is stored, because
    a trial writes to the store.
    """

    def __init__(
        self,
        unet: UNet,
        compile: Callable[[UNet, Sequence[Tensor | None]], Callable[..., Tensor]] = compile_graph,
        seconds_of: Callable[[Callable[[], object], torch.device], float] = seconds_of,
    ) -> None:
        self._unet = unet
        self._compile = compile
        self._seconds_of = seconds_of
        self._graphs: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}
        self._is_open = True
        self.trials: list[Trial] = []

    def close(self) -> None:
        self._is_open = False

    def fits(self, x: Tensor, text_kv: Tensor, text_lengths: Tensor | None, text_slots: Tensor | None) -> bool:
        key = _kind(x, text_kv, text_lengths, text_slots)
        if key not in self._graphs and self._is_open:
            self._graphs[key] = None
            return True
        return self._graphs.get(key) is not None

    def __call__(self, x: Tensor, time_projection: Tensor, text_kv: Tensor, *texts: Tensor | None) -> Tensor:
        inputs = (x, time_projection, text_kv, *texts)
        key = _kind(x, text_kv, *texts)
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._tried(inputs)
        return self._unet(*inputs) if graph is None else graph(*inputs)

    def _tried(self, inputs: tuple[Tensor | None, ...]) -> Callable[..., Tensor] | None:
        """The graph for inputs like these, or None if it is not to be used."""
        x, _, text_kv, *texts = inputs
        assert x is not None  # noqa: S101
        assert text_kv is not None  # noqa: S101
        rows, started_s = x.shape[0], time.monotonic()
        with _telling_inputs(self._unet, rows, *x.shape[2:], text_kv, *texts) as telling:
            try:
                # First by hand: what is chosen at a first call is then known to what is compiled.
                expected = self._unet(*telling)
                graph = self._compile(self._unet, telling)
                seconds = time.monotonic() - started_s
                difference = largest_difference(graph(*telling), expected)
                by_hand, compiled = (
                    self._seconds_of(functools.partial(call, *telling), x.device) for call in (self._unet, graph)
                )
            except torch.AcceleratorError:
                # The device may be lost, and then nothing works.
                raise
            except Exception as error:
                # torch's compiler has no common class of errors; the hand-made path needs none of it.
                log.warning("compile_failed", rows=rows, reason=_first_line(error))
                return None
        is_used = difference <= TOLERANCES[self._unet.dtype] and compiled < by_hand
        self.trials.append(Trial(rows, seconds, difference, by_hand / compiled, is_used))
        log.info(
            "compiled_network_in_use" if is_used else "compiled_network_not_used",
            rows=rows,
            seconds=round(seconds),
            speedup=round(by_hand / compiled, 2),
            difference=float(f"{difference:.1e}"),
        )
        return graph if is_used else None


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; infinite where a NaN would get lost in a maximum."""
    expected = expected.float()
    gap = ((expected - got.float()).abs().max() / expected.abs().max()).item()
    return gap if gap == gap else float("inf")


@contextmanager
def _telling_inputs(
    unet: UNet, rows: int, height: int, width: int, text_kv: Tensor, *texts: Tensor | None
) -> Iterator[tuple[Tensor | None, ...]]:
    """Inputs of the same kind whose outputs tell: a warm-up's own are zeros. The store of texts is the very one, with
    random texts in its first places for as long as this lasts."""
    x, time_projection, drawn = (
        part.to(text_kv.device) for part in random_inputs(unet, rows, height, width, text_kv.shape[1], TRIED_TEXTS)
    )
    places = text_kv[: drawn.shape[0]]
    held = places.clone()
    lengths, slots = (*texts, None, None)[:2]
    if slots is not None:
        slots = torch.arange(rows, device=text_kv.device) % places.shape[0]
    places.copy_(drawn[: places.shape[0]])
    try:
        yield x.contiguous(memory_format=torch.channels_last), time_projection, text_kv, *(lengths, slots)[: len(texts)]
    finally:
        places.copy_(held)


def _kind(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.shape for tensor in tensors)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
