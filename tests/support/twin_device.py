"""A GPU's twin on a CPU: the same calls with the same rules, so that what would go wrong there goes wrong here.

A captured tick is a list of operator calls with the very tensors they were called with. A replay makes these calls
again into these tensors, whatever Python objects may have been replaced since. What the device has not done yet the
host does not see, and what the host must not touch meanwhile is compared when the device is through with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from darkroom.engine.device import TickDevice
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What would make the host wait for a value, or bring a host's value to the device: neither can be captured.
UNCAPTURABLE = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "lift_fresh",
    "lift_fresh_copy",
)


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    # Packed weights are opaque and have no address, but no operator returns one as a view.
    return 0 if tensor.layout is not torch.strided else tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Operator calls, to be repeated on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in UNCAPTURABLE, f"{name} cannot be captured: it moves a value between device and host"
        result = func(*args, **(kwargs or {}))
        known = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        new = [t if storage_of(t) not in known else None for t in tensors_in(result)]
        self.calls.append((func, args, kwargs or {}, new))
        return result

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            again = tensors_in(func(*args, **kwargs))
            for output, value in zip(outputs, again, strict=True):
                if output is not None:
                    output.copy_(value)


@dataclass(eq=False)
class TwinEvent:
    """Copies that are complete once it was waited for, and whether it was."""

    to_device: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    to_host: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    is_complete: bool = False
    error: Exception | None = None

    def synchronize(self) -> None:
        if self.is_complete:
            return
        if self.error is not None:
            raise self.error
        for host, sent in self.to_device:
            assert torch.equal(host, sent), "the host wrote into a buffer whose copy was still to come"
        for host, value in self.to_host:
            host.copy_(value)
        self.is_complete = True


class TwinDevice(TickDevice):
    """See the module's docstring. `log` lists captures, replays, events recorded and waited for, in order.

    `fails(n)` may return the error that the n-th event (from 1) brings. An illegal access is what loses the device.
    """

    ticks_ahead = 1
    has_graphs = True
    has_stores = True
    tries_decoding = True

    def __init__(self, *, has_graphs: bool = True, fails: Callable[[int], Exception | None] = lambda n: None) -> None:
        super().__init__(torch.device("cpu"))
        self.has_graphs = has_graphs
        self.log: list[str] = []
        self._fails = fails
        self._hosts: set[int] = set()
        self._kept: list[Tensor] = []
        self._next = TwinEvent()
        self._events: list[TwinEvent] = []

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        buffer = super().host_buffer(shape, dtype)
        self._hosts.add(storage_of(buffer))
        # So that no other tensor gets its address.
        self._kept.append(buffer)
        return buffer

    def buffer_like(self, host: Tensor) -> Tensor:
        return torch.zeros_like(host)

    def copy(self, target: Tensor, source: Tensor) -> None:
        if storage_of(target) in self._hosts:
            self._next.to_host.append((target, source.clone()))
            # Whoever looks too early sees nothing good.
            target.zero_()
            return
        assert storage_of(source) in self._hosts
        target.copy_(source)
        self._next.to_device.append((source, source.clone()))

    def upload(self, host: Tensor) -> Tensor:
        return host.clone()

    def record(self) -> Any:
        self.log.append("record")
        event, self._next = self._next, TwinEvent()
        self._events.append(event)
        event.error = self._fails(len(self._events))
        return event

    def wait(self, event: Any) -> None:
        if event is not None and not event.is_complete:
            self.log.append("wait")
            event.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.log.append("capture")
        recording = Recording()
        with recording:
            work()

        def replay() -> None:
            self.log.append("replay")
            recording.replay()

        return replay

    def is_lost(self, error: BaseException) -> bool:
        return "illegal memory access" in str(error)

    @property
    def most_in_flight(self) -> int:
        """The most events that were recorded and not waited for at one time."""
        most = now = 0
        for entry in self.log:
            now += {"record": 1, "wait": -1}.get(entry, 0)
            most = max(most, now)
        return most
