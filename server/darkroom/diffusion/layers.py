"""The leaves of the networks: parameters under diffusers' names, and the fastest way to apply them.

Weights are created empty and always loaded. Activations are channels-last, so `[B, C, H, W]` pictures and `[B, H·W, C]`
tokens are two views of one memory.
"""

from __future__ import annotations

import darkroom_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import ModelError


class Conv2d(nn.Module):
    """A convolution with bias; `residual` is added to its result."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, padding: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.stride, self.padding = stride, padding

    def prepare(self) -> None:
        """Lay the loaded weight out for channels-last activations."""
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y if residual is None else y.add_(residual)


class Linear(nn.Module):
    """A matrix; `residual` is added to its result. `as_conv` names the weight as a 1×1 convolution's."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, as_conv: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, *((1, 1) if as_conv else ())))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight.flatten(1), self.bias)
        return y if residual is None else y.add_(residual)


class GroupNorm(nn.Module):
    """`darkroom_kernels.group_norm` with its parameters."""

    def __init__(self, num_groups: int, num_channels: int, eps: float):
        super().__init__()
        if num_channels % num_groups:
            raise ModelError(f"norm_num_groups is {num_groups}, which does not divide a norm's {num_channels} channels")
        self.weight = nn.Parameter(torch.empty(num_channels))
        self.bias = nn.Parameter(torch.empty(num_channels))
        self.num_groups, self.eps = num_groups, eps

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
    """`darkroom_kernels.geglu` with its parameters."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.proj = Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        assert self.proj.bias is not None  # noqa: S101
        return darkroom_kernels.geglu(x, self.proj.weight, self.proj.bias)


def concatenated(layers: list[Linear]) -> Linear:
    """One matrix that computes what `layers` compute, results side by side. They must agree on having a bias."""
    weight = torch.cat([layer.weight.detach().flatten(1) for layer in layers])
    fused = Linear.__new__(Linear)
    nn.Module.__init__(fused)
    fused.weight = nn.Parameter(weight, requires_grad=False)
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return fused


def tokens_of(x: Tensor) -> Tensor:
    """See `[B, C, H, W]` channels-last as `[B, H·W, C]`, without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def picture_of(tokens: Tensor, like: Tensor) -> Tensor:
    """See `[B, H·W, C]` as `[B, C, H, W]` with the height and width of `like`; the inverse of `tokens_of`."""
    batch, _, height, width = like.shape
    return tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)
