"""The leaves of the networks: parameters under diffusers' names, and the fastest way to apply them.

Weights are created empty and always loaded. Activations are channels-last, so `[B, C, H, W]` pictures and `[B, H·W, C]`
tokens are two views of one memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import darkroom_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import ModelError

# oneDNN computes with weights in blocked layouts, and torch blocks a plain weight anew in every call. These operators,
# which torch's own compiler uses on frozen graphs, take a weight that was blocked once and can add a residual.
_onednn: Any = torch.ops.mkldnn
_OPERATORS = ("_reorder_convolution_weight", "_convolution_pointwise", "_reorder_linear_weight", "_linear_pointwise")
# The best layout of a convolution depends on height and width; a layer remembers this many sizes.
MAX_PACKED_SIZES = 4
# A matrix is blocked alike for every batch but the smallest; this stands for all.
USUAL_ROWS = 64


def can_prepack(weight: Tensor) -> bool:
    """Whether oneDNN can keep this weight in its own layout."""
    is_available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not is_available or not torch.backends.mkldnn.enabled:
        return False
    if not all(hasattr(_onednn, name) for name in _OPERATORS):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(_onednn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


class Conv2d(nn.Module):
    """A convolution with bias; `residual` is added to its result."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, padding: int = 1):
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.stride, self.padding = stride, padding
        self._geometry = ([padding] * 2, [stride] * 2, [1, 1], 1)
        self._packed: dict[tuple[int, int], Tensor] | None = None

    def prepare(self) -> None:
        """Lay the loaded weight out for speed; after this it no longer answers to its name."""
        if self.weight is not None:
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
            if can_prepack(self.weight):
                self._packed = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._packed is None:
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
            return y if residual is None else y.add_(residual)
        weight = self._packed.get(x.shape[2:])  # type: ignore[arg-type]
        if weight is None:
            weight = self._pack(self._packed, x)
        y = (
            _onednn._convolution_pointwise(x, weight, self.bias, *self._geometry, "none", [], "")
            if residual is None
            else _onednn._convolution_pointwise.binary(
                x, residual, weight, self.bias, *self._geometry, "add", 1.0, None, [], None
            )
        )
        return y  # type: ignore[no-any-return]

    def _pack(self, packed: dict[tuple[int, int], Tensor], x: Tensor) -> Tensor:
        """Block the weight for inputs as high and wide as `x`, and let the plain one go: it can be brought back."""
        plain = next(iter(packed.values())).to_dense() if self.weight is None else self.weight.detach()
        weight: Tensor = _onednn._reorder_convolution_weight(plain, *self._geometry, list(x.shape))
        while len(packed) >= MAX_PACKED_SIZES:
            packed.pop(next(iter(packed)))
        packed[x.shape[2], x.shape[3]] = weight
        self.weight = None
        return weight


class Linear(nn.Module):
    """A matrix; `residual` is added to its result. `as_conv` names the weight as a 1×1 convolution's."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, as_conv: bool = False):
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(
            torch.empty(out_features, in_features, *((1, 1) if as_conv else ()))
        )
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.in_features, self.out_features = in_features, out_features
        self._packed: Tensor | None = None

    def prepare(self) -> None:
        """Lay the loaded weight out for speed; after this it no longer answers to its name."""
        if self.weight is None:
            return
        self.weight = nn.Parameter(self.weight.detach().flatten(1), requires_grad=False)
        # In fp32 torch's own matrix product is as fast and has less to do per call.
        if self.weight.dtype is torch.bfloat16 and can_prepack(self.weight):
            self._packed = _onednn._reorder_linear_weight(self.weight, USUAL_ROWS)
            self.weight = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._packed is None:
            y = F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]
            return y if residual is None else y.add_(residual)
        if residual is None:
            return _onednn._linear_pointwise(x, self._packed, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return _onednn._linear_pointwise.binary(x, residual, self._packed, self.bias, "add")  # type: ignore[no-any-return]


class GroupNorm(nn.Module):
    """`darkroom_kernels.group_norm` with its parameters."""

    def __init__(self, num_groups: int, num_channels: int, eps: float):
        super().__init__()
        if num_channels % num_groups:
            raise ModelError(f"norm_num_groups is {num_groups}, which does not divide a norm's {num_channels} channels")
        self.weight = nn.Parameter(torch.empty(num_channels))
        self.bias = nn.Parameter(torch.empty(num_channels))
        self.num_groups, self.eps = num_groups, eps

    def prepare(self) -> None:
        """On a CPU norms compute in fp32 whatever the activations are, so their parameters are cast once, here."""
        if self.weight.device.type == "cpu":
            self.weight.data, self.bias.data = self.weight.data.float(), self.bias.data.float()

    def forward(self, x: Tensor, *, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        return darkroom_kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu=silu, shift=shift)


class LayerNorm(nn.Module):
    """Layer norm over the last axis."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)


class GEGLU(nn.Module):
    """`darkroom_kernels.geglu` with its parameters; on a CPU two products with GELU and the gate fused into them."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.proj = Linear(in_features, 2 * out_features)
        self._packed: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def prepare(self) -> None:
        """Lay the loaded weight out for speed; after this it no longer answers to its name."""
        weight, bias = self.proj.weight, self.proj.bias
        if weight is not None and bias is not None and can_prepack(weight):
            value, gate = (_onednn._reorder_linear_weight(half, USUAL_ROWS) for half in weight.detach().chunk(2))
            value_bias, gate_bias = (half.clone() for half in bias.detach().chunk(2))
            self._packed = value, value_bias, gate, gate_bias
            self.proj.weight = self.proj.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return darkroom_kernels.geglu(x, self.proj.weight, self.proj.bias)  # type: ignore[arg-type]
        value, value_bias, gate, gate_bias = self._packed
        gated = _onednn._linear_pointwise(x, gate, gate_bias, "gelu", [], "none")
        return _onednn._linear_pointwise.binary(x, gated, value, value_bias, "mul")  # type: ignore[no-any-return]


def concatenated(layers: Sequence[Linear]) -> Linear:
    """One matrix that computes what `layers` compute, results side by side. They must agree on having a bias."""
    weights = [layer.weight.detach().flatten(1) for layer in layers if layer.weight is not None]
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    with torch.device("meta"):
        fused = Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=bool(biases))
    fused.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return fused


def prepare(network: nn.Module) -> None:
    """Lay all weights of a loaded and fused network out for speed."""
    # The gate's own product is within a module that prepares it whole, so that one comes first.
    for kind in (GEGLU, Conv2d, Linear, GroupNorm):
        for module in network.modules():
            if isinstance(module, kind):
                module.prepare()
    network.requires_grad_(False)


def tokens_of(x: Tensor) -> Tensor:
    """See `[B, C, H, W]` channels-last as `[B, H·W, C]`, without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def picture_of(tokens: Tensor, like: Tensor) -> Tensor:
    """See `[B, H·W, C]` as `[B, C, H, W]` with the height and width of `like`; the inverse of `tokens_of`."""
    batch, _, height, width = like.shape
    return tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)
