"""The leaves of the networks: parameters under diffusers' names, and the fastest way to apply them on a CPU.

What CUDA does otherwise with them is in `darkroom.diffusion.fused`.

Weights are created empty and always loaded. Activations are channels-last, so `[B, C, H, W]` pictures and `[B, H·W, C]`
tokens are two views of one memory.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import darkroom_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from darkroom.errors import ModelError

# The best layout of a convolution's weight depends on height and width, but most sizes agree on one. A layer holds its
# weight in this many layouts, and remembers which one this many sizes take.
MAX_LAYOUTS = 2
MAX_SIZES = 64
# Bytes of oneDNN's description of a layout that are padding between its fields: they hold whatever was there before.
LAYOUT_PADDING = slice(108, 112)
# A matrix is laid out alike for every batch but the smallest; this stands for all.
USUAL_ROWS = 64


class OneDNN:
    """torch's operators on weights in oneDNN's own layouts.

    A plain weight is laid out anew in every call; these take one that was laid out once, and can add a residual,
    apply GELU or multiply by a gate on the way out. torch's compiler uses them on frozen graphs.
    """

    def __init__(self) -> None:
        operators: Any = torch.ops.mkldnn
        self.pack_convolution = operators._reorder_convolution_weight.default
        self.convolution = operators._convolution_pointwise.default
        self.convolution_with = operators._convolution_pointwise.binary
        self.layout = operators._get_mkldnn_serialized_md.default
        self.pack_linear = operators._reorder_linear_weight.default
        self.linear = operators._linear_pointwise.default
        self.linear_with = operators._linear_pointwise.binary
        self.has_bf16 = bool(operators._is_mkldnn_bf16_supported())


@functools.cache
def load_onednn() -> OneDNN | None:
    """The operators, or None in a build of torch that lacks them."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        return OneDNN()
    except AttributeError:
        return None


def all_but_geglu(kernels: str) -> str:
    """What the setting's name means for every kernel but GEGLU, the only one that knows "gate"."""
    return "triton" if kernels == "gate" else kernels


@dataclass(frozen=True)
class Form:
    """How a network runs. Chosen once, when its weights are loaded.

    `onednn`: oneDNN's operators where layers may use them; None on CUDA. `kernels` names the implementation of
    `darkroom_kernels`' norms and residual, `geglu` that of its gated product.
    """

    onednn: OneDNN | None
    kernels: str = "auto"
    geglu: str = "auto"

    @classmethod
    def named(cls, onednn: OneDNN | None, kernels: str) -> Form:
        """`kernels` as the setting has it: "gate" is "triton" with the product of a gate left to torch."""
        return cls(onednn, all_but_geglu(kernels), kernels)

    def onednn_for(self, weight: Tensor) -> OneDNN | None:
        """The operators, if they can hold this weight."""
        if self.onednn is None or weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        return self.onednn if weight.dtype is torch.float32 or self.onednn.has_bf16 else None


class Layer(nn.Module):
    """A module that is called without torch's search for hooks, which takes longer than a small product."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def prepare(self, form: Form) -> None:
        """Take the loaded parameters over as plain tensors, laid out for speed; their names go."""
        for name, parameter in self._parameters.items():
            setattr(self, f"_{name}", None if parameter is None else parameter.detach())
            self._parameters[name] = None


class Conv2d(Layer):
    """A convolution with bias; `residual` is added to its result."""

    bias: nn.Parameter | None
    _weight: Tensor | None
    _bias: Tensor | None

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, padding: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.padding = padding
        self._geometry = ([padding] * 2, [stride] * 2, [1, 1], 1)
        self._packed: dict[torch.Size, Tensor] = {}
        self._layouts: dict[bytes, Tensor] = {}
        self._onednn: OneDNN | None = None

    def take_bias(self) -> Tensor:
        """Give the bias away, in fp32, to a layer that adds it on its own way; this one adds none from then on."""
        return _taken_bias(self)

    def prepare(self, form: Form) -> None:
        self._onednn = form.onednn_for(self.weight)
        super().prepare(form)
        if self._weight is not None and self._onednn is None:
            self._weight = self._weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        onednn = self._onednn
        if onednn is None:
            padding, stride, _, _ = self._geometry
            y = torch.conv2d(x, self._weight, self._bias, stride, padding)  # type: ignore[arg-type]
            # Nothing happens here on a device; only the shapes of meta tensors forget their layout.
            y = y.contiguous(memory_format=torch.channels_last)
            return y if residual is None else y.add_(residual)
        weight = self._packed.get(x.shape[2:])
        if weight is None:
            weight = self._pack(onednn, x)
        if residual is None:
            return onednn.convolution(x, weight, self._bias, *self._geometry, "none", [], "")  # type: ignore[no-any-return]
        return onednn.convolution_with(  # type: ignore[no-any-return]
            x, residual, weight, self._bias, *self._geometry, "add", 1.0, None, [], None
        )

    def _pack(self, onednn: OneDNN, x: Tensor) -> Tensor:
        """The weight laid out for inputs as high and wide as `x`. The plain one goes: it can be brought back."""
        plain = self._weight
        if plain is None:
            plain = next(iter(self._packed.values())).to_dense()
        weight: Tensor = onednn.pack_convolution(plain, *self._geometry, list(x.shape))
        layout = onednn.layout(weight).clone()
        layout[LAYOUT_PADDING] = 0
        weight = self._layouts.setdefault(bytes(layout.tolist()), weight)
        if len(self._layouts) > MAX_LAYOUTS:
            dropped = self._layouts.pop(next(iter(self._layouts)))
            self._packed = {size: kept for size, kept in self._packed.items() if kept is not dropped}
        while len(self._packed) >= MAX_SIZES:
            self._packed.pop(next(iter(self._packed)))
        self._packed[x.shape[2:]] = weight
        self._weight = None
        return weight


class Linear(Layer):
    """A matrix; `residual` is added to its result. `as_conv` names the weight as a 1×1 convolution's."""

    bias: nn.Parameter | None
    _weight: Tensor
    _bias: Tensor | None = None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, as_conv: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, *((1, 1) if as_conv else ())))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.in_features, self.out_features = in_features, out_features
        self._onednn: OneDNN | None = None

    def take_bias(self) -> Tensor:
        """As `Conv2d.take_bias`."""
        return _taken_bias(self)

    def add_to_bias(self, more: Tensor) -> None:
        """Add `more` `[out_features]` fp32 to the loaded bias."""
        assert self.bias is not None  # noqa: S101
        self.bias = nn.Parameter((self.bias.float() + more).to(self.bias.dtype), requires_grad=False)

    def prepare(self, form: Form) -> None:
        # In fp32 torch's own matrix product is as fast and has less to do per call.
        self._onednn = None if self.weight.dtype is torch.float32 else form.onednn_for(self.weight)
        super().prepare(form)
        self._weight = self._weight.flatten(1)
        if self._onednn is not None:
            self._weight = self._onednn.pack_linear(self._weight, USUAL_ROWS)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        onednn = self._onednn
        if onednn is None:
            y = F.linear(x, self._weight, self._bias)
            return y if residual is None else y.add_(residual)
        if residual is None:
            return onednn.linear(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]
        return onednn.linear_with(x, residual, self._weight, self._bias, "add")  # type: ignore[no-any-return]

    def accumulate_(self, y: Tensor, x: Tensor) -> None:
        """Add the product of `x` `[..., in_features]` to `y` `[..., out_features]` in place, without the bias.

        The product's own kernel reads and writes `y`. Out of place, torch would copy `y` first (`addmm_out_cuda_impl`
        in its Blas.cpp). Both must be dense, else `view` raises.
        """
        y.view(-1, self.out_features).addmm_(x.view(-1, self.in_features), self._weight.t())


class GroupNorm(Layer):
    """`darkroom_kernels.group_norm` with its parameters."""

    _weight: Tensor
    _bias: Tensor

    def __init__(self, num_groups: int, num_channels: int, eps: float):
        super().__init__()
        if num_channels % num_groups:
            raise ModelError(f"norm_num_groups is {num_groups}, which does not divide a norm's {num_channels} channels")
        self.weight = nn.Parameter(torch.empty(num_channels))
        self.bias = nn.Parameter(torch.empty(num_channels))
        self.num_groups, self.eps = num_groups, eps
        self._kernels = "auto"

    def prepare(self, form: Form) -> None:
        super().prepare(form)
        self._kernels = form.kernels
        # On a CPU norms compute in fp32 whatever the activations are, so their parameters are cast once, here.
        if self._weight.device.type == "cpu":
            self._weight, self._bias = self._weight.float(), self._bias.float()

    def forward(self, x: Tensor, *, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        return darkroom_kernels.group_norm(
            x,
            self.num_groups,
            self._weight,
            self._bias,
            self.eps,
            silu=silu,
            shift=shift,
            implementation=self._kernels,
        )


class LayerNorm(Layer):
    """Layer norm over the last axis."""

    _weight: Tensor
    _bias: Tensor

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.width, self.eps = (width,), eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.width, self._weight, self._bias, self.eps)


class GEGLU(Layer):
    """`darkroom_kernels.geglu` with its parameters; on a CPU two products with GELU and the gate fused into them."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.proj = Linear(in_features, 2 * out_features)
        self._weights: tuple[Tensor, ...] = ()
        self._biases: tuple[Tensor, ...] = ()
        self._onednn: OneDNN | None = None
        self._kernels = "auto"

    def prepare(self, form: Form) -> None:
        weight, bias = self.proj.weight.detach(), self.proj.bias
        assert bias is not None  # noqa: S101
        self._kernels = form.geglu
        onednn = self._onednn = form.onednn_for(weight)
        if onednn is None:
            self._weights, self._biases = (weight,), (bias.detach(),)
        else:
            self._weights = tuple(onednn.pack_linear(half, USUAL_ROWS) for half in weight.chunk(2))
            self._biases = tuple(half.clone() for half in bias.detach().chunk(2))
        del self.proj

    def forward(self, x: Tensor) -> Tensor:
        if self._onednn is None:
            return darkroom_kernels.geglu(x, *self._weights, *self._biases, implementation=self._kernels)
        value, gate = self._weights
        value_bias, gate_bias = self._biases
        gated = self._onednn.linear(x, gate, gate_bias, "gelu", [], "none")
        return self._onednn.linear_with(x, gated, value, value_bias, "mul")  # type: ignore[no-any-return]


def _taken_bias(layer: Conv2d | Linear) -> Tensor:
    assert layer.bias is not None, "a bias is given away once"  # noqa: S101
    bias, layer.bias = layer.bias.detach().float(), None
    return bias


def concatenated(layers: Sequence[Linear]) -> Linear:
    """One matrix that computes what `layers` compute, results side by side. They must agree on having a bias."""
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    with torch.device("meta"):
        fused = Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=bool(biases))
    weights = torch.cat([layer.weight.detach().flatten(1) for layer in layers])
    fused.weight = nn.Parameter(weights, requires_grad=False)
    fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return fused


def prepare(network: nn.Module, form: Form) -> None:
    """Lay all weights of a loaded and fused network out for speed. It is not to be changed or moved after this."""
    # A gate takes its product apart and drops it, so gates come first.
    for is_gate in (True, False):
        for module in list(network.modules()):
            if isinstance(module, Layer) and isinstance(module, GEGLU) is is_gate:
                module.prepare(form)
    # nn.Module finds its parts by a slow detour, and its lists are slower still; plain attributes are not.
    for module in list(network.modules()):
        for name, part in module._modules.items():
            vars(module)[name] = list(part) if isinstance(part, nn.ModuleList) else part


class _Widening(TorchFunctionMode):
    """Under it a deep copy's tensors are fp32 wherever the original's are of some other floating type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.float() if tensor.is_floating_point() else tensor.clone())


def widened(network: nn.Module) -> nn.Module:
    """A copy, on the same device, of a network that was prepared in fp16, which computes in fp32 with the same weights.

    No file is read and nothing is laid out anew, so it is there at once; it takes twice the memory of the original.
    """
    with _Widening():
        return copy.deepcopy(network)


def tokens_of(x: Tensor) -> Tensor:
    """See `[B, C, H, W]` channels-last as `[B, H·W, C]`, without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def picture_of(tokens: Tensor, like: Tensor) -> Tensor:
    """See `[B, H·W, C]` as `[B, C, H, W]` with the height and width of `like`; the inverse of `tokens_of`."""
    batch, _, height, width = like.shape
    return tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)
