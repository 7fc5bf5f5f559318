"""The blocks in the form that CUDA runs: nothing passes over a picture alone that could ride on something else.

torch adds the bias of a cuDNN convolution in a pass of its own, and copies a residual before it accumulates a product
onto the copy. So here no convolution inside a block has a bias, and a product is accumulated onto the residual in place
(`Linear.accumulate_`). What becomes of the biases, all of them constants per channel:

- a block's first convolution: into the shift of the norm behind it, where the time embedding is added as well;
- its second: into the shortcut's bias, or added together with the residual;
- attention and feed-forward: carried along as the shift of the layer norms that follow, and multiplied into the last
  projection's bias;
- the last projection of a transformer: into the bias that ends the residual block before it. The transformer's norm
  shifts it away again, since the transformer reads the picture without it.

All of this is equal to the blocks of `darkroom.diffusion.blocks` up to rounding. Each class takes one of those with its
weights loaded, and takes its layers over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import darkroom_kernels
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from darkroom.diffusion.blocks import Conditioning, PictureAttention, ResnetBlock, Transformer, TransformerBlock
from darkroom.diffusion.layers import Form, Layer, LayerNorm, Linear, picture_of, tokens_of


class FusedResnet(Layer):
    """`ResnetBlock`. Its result is new memory, which the block behind it may write to.

    `input_bias` `[in_channels]` is missing from the input; `output_bias` `[out_channels]` is what the block behind
    wants added to the result. Both fp32 or None.
    """

    def __init__(self, plain: ResnetBlock, input_bias: Tensor | None = None, output_bias: Tensor | None = None):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = plain.norm1, plain.conv1, plain.norm2, plain.conv2
        self.shortcut = plain.conv_shortcut
        self.time_index = plain.time_index
        dtype = plain.conv1.weight.dtype
        self._input_shift = None if input_bias is None else input_bias.to(dtype)
        # In a UNet the time shifts have taken it.
        self._middle_shift = None if plain.conv1.bias is None else plain.conv1.take_bias().to(dtype)
        bias = plain.conv2.take_bias()
        if output_bias is not None:
            bias = bias + output_bias
        if self.shortcut is None:
            self._bias = (bias if input_bias is None else bias + input_bias).to(dtype)
        else:
            if input_bias is not None:
                bias = bias + self.shortcut.weight.detach().flatten(1).float() @ input_bias
            self.shortcut.add_to_bias(bias)
        self._kernels = "auto"

    def prepare(self, form: Form) -> None:
        self._kernels = form.kernels

    def forward(self, x: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True, shift=_for_rows(self._input_shift, x)))
        shift = _for_rows(self._middle_shift, x) if conditioning is None else conditioning.time_shifts[self.time_index]
        y: Tensor = self.conv2(self.norm2(h, silu=True, shift=shift))
        if self.shortcut is not None:
            return y.add_(picture_of(self.shortcut(tokens_of(x)), x))
        return darkroom_kernels.add_residual_(y, x, self._bias, implementation=self._kernels)


class ShiftedLayerNorm(Layer):
    """`LayerNorm` of tokens to which the constant `shift` `[width]` fp32 was yet to be added."""

    _weight: Tensor
    _bias: Tensor

    def __init__(self, plain: LayerNorm, shift: Tensor):
        super().__init__()
        self.weight, self.bias, self.eps = plain.weight, plain.bias, plain.eps
        self._shift = shift.to(plain.weight.dtype)
        self._kernels = "auto"

    def prepare(self, form: Form) -> None:
        super().prepare(form)
        self._kernels = form.kernels

    def forward(self, x: Tensor) -> Tensor:
        return darkroom_kernels.layer_norm(
            x, self._weight, self._bias, self.eps, shift=self._shift, implementation=self._kernels
        )


class FusedTransformerBlock(Layer):
    """`TransformerBlock`, working on tokens in place.

    `missing` `[width]` fp32 is what the tokens lack on entry; on leaving they lack `self.missing`.
    """

    def __init__(self, plain: TransformerBlock, missing: Tensor):
        super().__init__()
        self.attn1, self.attn2 = plain.attn1, plain.attn2
        self.out1 = cast(Linear, plain.attn1.to_out[0])
        self.out2 = cast(Linear, plain.attn2.to_out[0])
        self.gate = plain.ff.net[0]
        self.out3 = cast(Linear, plain.ff.net[2])
        self.norm1 = ShiftedLayerNorm(plain.norm1, missing)
        missing = missing + self.out1.take_bias()
        self.norm2 = ShiftedLayerNorm(plain.norm2, missing)
        missing = missing + self.out2.take_bias()
        self.norm3 = ShiftedLayerNorm(plain.norm3, missing)
        self.missing = missing + self.out3.take_bias()

    def forward(self, tokens: Tensor, conditioning: Conditioning) -> None:
        self.out1.accumulate_(tokens, self.attn1.attend(self.norm1(tokens), conditioning))
        self.out2.accumulate_(tokens, self.attn2.attend(self.norm2(tokens), conditioning))
        self.out3.accumulate_(tokens, self.gate(self.norm3(tokens)))


class FusedTransformer(Layer):
    """`Transformer`, writing into the picture it is given. `output_bias` `[width]` fp32 is to be in that already."""

    def __init__(self, plain: Transformer):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = plain.norm, plain.proj_in, plain.proj_out
        weight = plain.proj_out.weight.detach().flatten(1).float()
        missing = torch.zeros(weight.shape[1], device=weight.device)
        plain_blocks: list[Any] = list(plain.transformer_blocks)
        blocks = []
        for block in plain_blocks:
            blocks.append(FusedTransformerBlock(block, missing))
            missing = blocks[-1].missing
        self.transformer_blocks = nn.ModuleList(blocks)
        self.output_bias = plain.proj_out.take_bias() + weight @ missing
        self._shift = (-self.output_bias).to(plain.proj_out.weight.dtype)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = self.proj_in(tokens_of(self.norm(x, shift=_for_rows(self._shift, x))))
        for block in self.transformer_blocks:
            block(tokens, conditioning)
        self.proj_out.accumulate_(tokens_of(x), tokens)
        return x


class FusedPictureAttention(Layer):
    """`PictureAttention`, writing into the picture it is given. `output_bias` as in `FusedTransformer`."""

    def __init__(self, plain: PictureAttention):
        super().__init__()
        self.plain = plain
        self.out = cast(Linear, plain.to_out[0])
        self.output_bias = self.out.take_bias()
        self._shift = (-self.output_bias).to(self.out.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        tokens = tokens_of(self.plain.group_norm(x, shift=_for_rows(self._shift, x)))
        self.out.accumulate_(tokens_of(x), self.plain.attend(tokens))
        return x


def _for_rows(shift: Tensor | None, x: Tensor) -> Tensor | None:
    """One constant `[C]` as the shift `[B, C]` of every row of `x`, without a copy."""
    return None if shift is None else shift.expand(x.shape[0], -1)


@register_flop_formula(torch.ops.aten.addmm_)
def _accumulate_flop(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: Any) -> int:
    """torch counts `addmm`, but not its form in place."""
    return 2 * left[0] * left[1] * right[1]
