"""What differs between ticks on a CPU and ticks on a GPU, and nothing else: streams, events, pinned memory, graphs.

Everything that the ticks' thread gives to a GPU goes to one stream, in order. So a slot of a row or a prompt may be
given away and written anew while ticks that still read it are enqueued: the write comes after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Eager calls before a capture: the first initialises libraries and compiles kernels, the next ones settle algorithms.
WARM_UP_CALLS = 3


class TickDevice:
    """A CPU: whatever was asked for is done when the call returns, and nothing is captured.

    `ticks_ahead` is how many ticks may be enqueued beside the one that runs; `has_graphs` whether `capture` may be
    called; `has_stores` whether what ticks read should keep its address for good; `tries_decoding` whether the decoder
    should meet each size of a call before anybody waits.
    """

    ticks_ahead = 0
    has_graphs = False
    has_stores = False
    tries_decoding = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def activated(self, *, is_reproducible: bool) -> Iterator[None]:
        """Make this the place where the calling thread's tensor work goes."""
        yield

    @contextmanager
    def trying_algorithms(self, *, is_reproducible: bool) -> Iterator[None]:
        """Let first calls of a size try out what the libraries offer; later calls of the same thread use the winner.

        Only where nobody waits, and never where results must not depend on a measurement.
        """
        yield

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros on the host that `copy` can read and write without making anybody wait."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def buffer_like(self, host: Tensor) -> Tensor:
        """The device's counterpart of a host buffer. On a CPU it is the buffer itself."""
        return host

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy between a host buffer and its counterpart, in stream order; the host does not wait."""
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)

    def upload(self, host: Tensor) -> Tensor:
        """`host` on the device, without waiting for what is enqueued there."""
        return host

    def download(self, tensor: Tensor) -> Tensor:
        """A copy on the host, there once everything enqueued so far is complete."""
        host = self.host_buffer(tensor.shape, tensor.dtype)
        host.copy_(tensor, non_blocking=True)
        return host

    def record(self) -> torch.cuda.Event | None:
        """An event that is complete when everything enqueued so far is; None when that is now."""
        return None

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Return when `event` is complete. Raises what went wrong on the device before it."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture `work`, which was called before, as a graph. Returns its replay.

        `work` reads and writes tensors that outlive the graph at addresses that never change, allocates only what it
        also drops, and never lets the host look at a value.
        """
        raise NotImplementedError("a CPU has no graphs")

    def is_lost(self, error: BaseException) -> bool:
        """Whether `error` left this process without its device, so that trying again here is in vain."""
        return False

    def graph_bytes(self) -> int:
        """Memory that is reserved on the device and that no live tensor uses, after what can be freed was freed."""
        return 0


class CudaDevice(TickDevice):
    """A GPU, with a stream of its own for the ticks and one memory pool for all graphs."""

    ticks_ahead = 1
    has_stores = True
    tries_decoding = True

    def __init__(self, device: torch.device, *, has_graphs: bool) -> None:
        super().__init__(device)
        self.has_graphs = has_graphs
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    @contextmanager
    def activated(self, *, is_reproducible: bool) -> Iterator[None]:
        # The switches are the whole process's. Under traffic nothing is tried out: a new size would time every
        # algorithm, in the decoder's thread too, and end by giving all cached memory back to the driver.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = is_reproducible
        # Weights were written on another stream.
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def trying_algorithms(self, *, is_reproducible: bool) -> Iterator[None]:
        # torch keeps cuDNN's plans by thread and problem, and asks for them before it looks at this switch.
        torch.backends.cudnn.benchmark = not is_reproducible
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = False

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def buffer_like(self, host: Tensor) -> Tensor:
        return torch.zeros_like(host, device=self.device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def upload(self, host: Tensor) -> Tensor:
        # A copy from pageable memory would wait for the ticks before it.
        return host.pin_memory().to(self.device, non_blocking=True)

    def record(self) -> torch.cuda.Event | None:
        # Blocking: the thread sleeps instead of spinning, and the next tick is enqueued already.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what the decoder's or the encoder's thread asks of CUDA meanwhile is no concern of this graph.
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except BaseException:
            # A capture that broke may leave its pool recording, and no other can use it then. Graphs that were
            # captured keep theirs.
            self._pool = None
            raise
        return graph.replay

    def is_lost(self, error: BaseException) -> bool:
        return is_device_lost(error, self.device)

    def graph_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)


def device_for(device: torch.device, *, graphs: bool) -> TickDevice:
    """The ticks' side of a torch device; `graphs` says whether a GPU may capture them."""
    return CudaDevice(device, has_graphs=graphs) if device.type == "cuda" else TickDevice(device)


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors in host memory, once the current stream has made them; the calling thread sleeps until then."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    there = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for target, source in zip(there, tensors, strict=True):
        target.copy_(source, non_blocking=True)
    # The kind that sleeps: a thread that spins would hold a core that the ticks' launches need.
    arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    arrived.record()
    arrived.synchronize()
    return there


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory left for what was asked of it, in torch's own words or in a library's."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text


def comes_from_cuda(error: BaseException) -> bool:
    """Whether CUDA itself refused or failed; running out of memory apart, which is ordinary."""
    if is_out_of_memory(error):
        return False
    text = str(error)
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "Triton Error [CUDA]" in text


def is_device_lost(error: BaseException, device: torch.device | None = None) -> bool:
    """Whether a CUDA error leaves this process without its device (None: the current one).

    An illegal access, a failed assertion or a card that fell off the bus do; a call that was merely not permitted, as
    during a capture, does not. The device is asked: a context that is lost repeats its error for ever.
    """
    if not comes_from_cuda(error):
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False
