"""The blocks that UNet and autoencoder are made of, with diffusers' parameter names, in the form that a CPU runs.

Source of the structure: diffusers `models/unets/unet_2d_blocks.py`, `models/resnet.py`, `models/attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import darkroom_kernels
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.diffusion.layers import (
    GEGLU,
    Conv2d,
    GroupNorm,
    Layer,
    LayerNorm,
    Linear,
    concatenated,
    picture_of,
    tokens_of,
)


@dataclass
class Conditioning:
    """What a UNet call knows besides the picture; a layer picks its own by index.

    `time_shifts`: one `[B, C]` per residual block. `text`: keys, then values, each `[S, L, C]`, of one cross-attention
    after the other. `text_lengths`: `[B]` int32, or None when no row is padded. `text_slots`: `[B]` int64, the text
    that a row reads; None when row b reads text b.
    """

    time_shifts: Sequence[Tensor]
    text: Sequence[Tensor]
    text_lengths: Tensor | None = None
    text_slots: Tensor | None = None


class ResnetBlock(Layer):
    """Two convolutions with a skip; the time embedding shifts the middle."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels)
        self.time_emb_proj = Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels)
        self.conv_shortcut = Linear(in_channels, out_channels, as_conv=True) if in_channels != out_channels else None
        self.time_index = 0

    def forward(self, x: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        shift = None if conditioning is None else conditioning.time_shifts[self.time_index]
        h = self.norm2(h, silu=True, shift=shift)
        if self.conv_shortcut is not None:
            x = picture_of(self.conv_shortcut(tokens_of(x)), x)
        return self.conv2(h, x)  # type: ignore[no-any-return]


class SelfAttention(Layer):
    """Attention of tokens to each other; `fuse` makes its three input matrices one."""

    def __init__(self, width: int, heads: int, attention: str, *, bias: bool = False):
        super().__init__()
        self.to_q: Linear | None = Linear(width, width, bias=bias)
        self.to_k: Linear | None = Linear(width, width, bias=bias)
        self.to_v: Linear | None = Linear(width, width, bias=bias)
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.to_qkv: Linear | None = None
        self.heads, self.attention = heads, attention

    def fuse(self) -> None:
        if self.to_q is not None and self.to_k is not None and self.to_v is not None:
            self.to_qkv = concatenated([self.to_q, self.to_k, self.to_v])
            self.to_q = self.to_k = self.to_v = None

    def attend(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """What goes into `to_out`: `[B, L, C]`, as `x`. Queries, keys and values are views of one product."""
        assert self.to_qkv is not None, "fuse() comes before the first call"  # noqa: S101
        batch, length, _ = x.shape
        q, k, v = self.to_qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return darkroom_kernels.attention(q, k, v, implementation=self.attention).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, residual: Tensor, conditioning: Conditioning) -> Tensor:
        return self.to_out[0](self.attend(x, conditioning), residual)  # type: ignore[no-any-return]


class CrossAttention(Layer):
    """Attention of tokens to the text; keys and values come ready from `UNet.text_kv`."""

    def __init__(self, width: int, text_dim: int, heads: int, attention: str):
        super().__init__()
        self.to_q = Linear(width, width, bias=False)
        self.to_k: Linear | None = Linear(text_dim, width, bias=False)
        self.to_v: Linear | None = Linear(text_dim, width, bias=False)
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.heads, self.attention = heads, attention
        self.text_index = 0

    def attend(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """What goes into `to_out`: `[B, L, C]`, as `x`."""
        sources = (self.to_q(x), conditioning.text[self.text_index], conditioning.text[self.text_index + 1])
        q, k, v = (part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in sources)
        out = darkroom_kernels.attention(
            q,
            k,
            v,
            key_lengths=conditioning.text_lengths,
            key_slots=conditioning.text_slots,
            implementation=self.attention,
        )
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, residual: Tensor, conditioning: Conditioning) -> Tensor:
        return self.to_out[0](self.attend(x, conditioning), residual)  # type: ignore[no-any-return]


class FeedForward(Layer):
    """GEGLU and a matrix back; four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        # The middle entry stands for diffusers' dropout, so that the matrix is called net.2.
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.net[2](self.net[0](x), residual)  # type: ignore[no-any-return]


class TransformerBlock(Layer):
    """Self-attention (or a second cross-attention), cross-attention and feed-forward, each behind a layer norm."""

    def __init__(self, width: int, text_dim: int, heads: int, attention: str, *, only_cross_attention: bool):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1: SelfAttention | CrossAttention = (
            CrossAttention(width, text_dim, heads, attention)
            if only_cross_attention
            else SelfAttention(width, heads, attention)
        )
        self.norm2 = LayerNorm(width)
        self.attn2 = CrossAttention(width, text_dim, heads, attention)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        x = self.attn1(self.norm1(x), x, conditioning)
        x = self.attn2(self.norm2(x), x, conditioning)
        return self.ff(self.norm3(x), x)  # type: ignore[no-any-return]


class Transformer(Layer):
    """Transformer blocks over the places of a picture, between two projections and inside a skip."""

    def __init__(
        self,
        width: int,
        text_dim: int,
        heads: int,
        num_layers: int,
        groups: int,
        attention: str,
        *,
        use_linear_projection: bool,
        only_cross_attention: bool,
    ):
        super().__init__()
        self.norm = GroupNorm(groups, width, 1e-6)
        self.proj_in = Linear(width, width, as_conv=not use_linear_projection)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, text_dim, heads, attention, only_cross_attention=only_cross_attention)
            for _ in range(num_layers)
        )
        self.proj_out = Linear(width, width, as_conv=not use_linear_projection)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = self.proj_in(tokens_of(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, conditioning)
        return picture_of(self.proj_out(tokens, tokens_of(x)), x)


class PictureAttention(Layer):
    """Self-attention over all places of a picture, with one head, behind a group norm and inside a skip."""

    def __init__(self, channels: int, groups: int, eps: float, attention: str):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps)
        self.to_q: Linear | None = Linear(channels, channels)
        self.to_k: Linear | None = Linear(channels, channels)
        self.to_v: Linear | None = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])
        self.to_qkv: Linear | None = None
        self.attention = attention

    def fuse(self) -> None:
        if self.to_q is not None and self.to_k is not None and self.to_v is not None:
            self.to_qkv = concatenated([self.to_q, self.to_k, self.to_v])
            self.to_q = self.to_k = self.to_v = None

    def attend(self, tokens: Tensor) -> Tensor:
        """What goes into `to_out`: `[B, L, C]`, as `tokens`."""
        assert self.to_qkv is not None, "fuse() comes before the first call"  # noqa: S101
        q, k, v = self.to_qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
        return darkroom_kernels.attention(q, k, v, implementation=self.attention).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return picture_of(self.to_out[0](self.attend(tokens_of(self.group_norm(x))), tokens_of(x)), x)


class Downsample(Layer):
    """Halve height and width with a strided convolution; padding 0 pads right and below only, as diffusers does."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding else F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(Layer):
    """Repeat pixels up to height and width of `size`, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # type: ignore[no-any-return]
