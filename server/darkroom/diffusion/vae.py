"""The autoencoder between pictures and latents (AutoencoderKL), with diffusers' parameter names.

Source of the structure: diffusers `models/autoencoders/autoencoder_kl.py` and `vae.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.diffusion.blocks import Downsample, PictureAttention, ResnetBlock, Upsample
from darkroom.diffusion.config import check_fixed, number, positive_int, positive_ints, refusal
from darkroom.diffusion.fused import FusedPictureAttention, FusedResnet
from darkroom.diffusion.layers import Conv2d, Form, GroupNorm, load_onednn, prepare
from darkroom.diffusion.tiles import decode_in_tiles

NORM_EPS = 1e-6
# Pictures are decoded together while they have this many pixels in all.
MAX_DECODE_PIXELS = 1 << 21
# What this autoencoder does in one way only: the key of the config, and the values that mean that way.
FIXED: dict[str, tuple[Any, ...]] = {"act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,)}


@dataclass(frozen=True)
class VAEConfig:
    """A diffusers AutoencoderKL config with the defaults filled in.

    `force_upcast` says that SDXL's weights overflow in fp16. Files that leave it out mean yes, as in diffusers; there
    as here only SDXL's pipelines ask (`darkroom.diffusion.loader`).
    """

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """Read `vae/config.json`. Raises `ModelError` naming the first key that cannot be honoured."""
        check_fixed(config, FIXED)
        channels = positive_ints(config, "block_out_channels", (64,))
        for key, name in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if list(config.get(key, (name,))) != [name] * len(channels):
                raise refusal(config, key, f"{len(channels)} of {name}")
        scaling_factor = number(config, "scaling_factor", 0.18215)
        if scaling_factor <= 0:
            raise refusal(config, "scaling_factor", "a positive number")
        return cls(
            in_channels=positive_int(config, "in_channels", 3),
            out_channels=positive_int(config, "out_channels", 3),
            latent_channels=positive_int(config, "latent_channels", 4),
            block_out_channels=channels,
            layers_per_block=positive_int(config, "layers_per_block", 1, limit=64),
            norm_num_groups=positive_int(config, "norm_num_groups", 32),
            scaling_factor=scaling_factor,
            shift_factor=0.0 if config.get("shift_factor") is None else number(config, "shift_factor", 0.0),
            force_upcast=bool(config.get("force_upcast", True)),
            use_quant_conv=bool(config.get("use_quant_conv", True)),
            use_post_quant_conv=bool(config.get("use_post_quant_conv", True)),
            mid_block_add_attention=bool(config.get("mid_block_add_attention", True)),
        )

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.block_out_channels) - 1))


class MidBlock(nn.Module):
    """Two residual blocks with attention between."""

    def __init__(self, config: VAEConfig, attention: str):
        super().__init__()
        width, groups = config.block_out_channels[-1], config.norm_num_groups
        self.attentions = nn.ModuleList(
            [PictureAttention(width, groups, NORM_EPS, attention)] if config.mid_block_add_attention else []
        )
        self.resnets = nn.ModuleList(ResnetBlock(width, width, None, groups, NORM_EPS) for _ in range(2))

    def fuse(self, input_bias: Tensor | None) -> None:
        """As `PictureBlock.fuse`; the output lacks nothing."""
        plain: list[Any] = [*self.resnets, *self.attentions]
        attentions = [FusedPictureAttention(attention) for attention in plain[2:]]
        output_bias = attentions[0].output_bias if attentions else None
        self.resnets = nn.ModuleList([FusedResnet(plain[0], input_bias, output_bias), FusedResnet(plain[1])])
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)  # type: ignore[no-any-return]


class PictureBlock(nn.Module):
    """Residual blocks of one resolution and, for all but the last, the step to the next."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        *,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if index == 0 else out_channels, out_channels, None, groups, NORM_EPS)
            for index in range(num_layers)
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels, 0)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def fuse(self, input_bias: Tensor | None) -> Tensor | None:
        """Give the blocks the form of CUDA. `input_bias` is what the input lacks; returned is what the output lacks."""
        resnets: list[Any] = list(self.resnets)
        self.resnets = nn.ModuleList([FusedResnet(resnets[0], input_bias), *map(FusedResnet, resnets[1:])])
        resamplers: list[Any] = [*self.downsamplers, *self.upsamplers]
        return resamplers[0].conv.take_bias() if resamplers else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        for upsample in self.upsamplers:
            x = upsample(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


class Encoder(nn.Module):
    """Pictures to the mean and log-variance of latents, side by side."""

    def __init__(self, config: VAEConfig, attention: str):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            PictureBlock(
                widths[max(index - 1, 0)], width, config.layers_per_block, groups, downsample=index < len(widths) - 1
            )
            for index, width in enumerate(widths)
        )
        self.mid_block = MidBlock(config, attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels)

    def fuse(self) -> None:
        """Give all blocks the form of CUDA."""
        bias: Tensor | None = self.conv_in.take_bias()
        blocks: list[Any] = list(self.down_blocks)
        for block in blocks:
            bias = block.fuse(bias)
        self.mid_block.fuse(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), silu=True))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config: VAEConfig, attention: str):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(config, attention)
        self.up_blocks = nn.ModuleList(
            PictureBlock(
                widths[max(index - 1, 0)], width, config.layers_per_block + 1, groups, upsample=index < len(widths) - 1
            )
            for index, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels)

    def fuse(self) -> None:
        """Give all blocks the form of CUDA."""
        self.mid_block.fuse(self.conv_in.take_bias())
        bias: Tensor | None = None
        blocks: list[Any] = list(self.up_blocks)
        for block in blocks:
            bias = block.fuse(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))  # type: ignore[no-any-return]


class VAE(nn.Module):
    """See the module's docstring. Load weights under diffusers' names, call `fuse()` once, then use.

    `config` is the contents of `vae/config.json`; `attention` names the implementation of `darkroom_kernels.attention`,
    `kernels` that of its other operations. Pictures with a side above `tile_px` are decoded in tiles
    (`darkroom.diffusion.tiles`); None: never. Latents are in the denoiser's space: shift and scale of the config are
    applied here. Raises `ModelError` on a config that cannot be honoured.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | VAEConfig,
        *,
        attention: str = "auto",
        kernels: str = "auto",
        tile_px: int | None = None,
    ):
        super().__init__()
        self.config = config = config if isinstance(config, VAEConfig) else VAEConfig.from_dict(config)
        latents = config.latent_channels
        self.encoder = Encoder(config, attention)
        self.decoder = Decoder(config, attention)
        self.quant_conv = Conv2d(2 * latents, 2 * latents, 1, padding=0) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(latents, latents, 1, padding=0) if config.use_post_quant_conv else None
        self.dtype = torch.float32
        self.tile_px = tile_px
        self._kernels = kernels

    def fuse(self, *, for_cuda: bool | None = None) -> VAE:
        """Join queries, keys and values, and lay weights out for speed. Call it once, on loaded weights.

        `for_cuda` as in `UNet.fuse`.
        """
        for_cuda = self.decoder.conv_in.weight.device.type != "cpu" if for_cuda is None else for_cuda
        for module in self.modules():
            if isinstance(module, PictureAttention):
                module.fuse()
        self.dtype = self.decoder.conv_in.weight.dtype
        if for_cuda:
            self.encoder.fuse()
            self.decoder.fuse()
        prepare(self, Form.named(None if for_cuda else load_onednn(), self._kernels))
        return self

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents `[B, C, h, w]` fp32 into pictures `[B, 3, H, W]` fp32 in [-1, 1], channels-last.

        An overflow inside comes out as NaN, since infinity does not survive the norms.
        """
        scale = self.config.scale_factor
        if self.tile_px is None or max(latents.shape[2:]) * scale <= self.tile_px:
            pixels = self._decode(latents)
        else:
            pixels = decode_in_tiles(self._decode, latents, max(1, self.tile_px // scale), scale)
        return pixels.float().clamp_(-1.0, 1.0)

    def _decode(self, latents: Tensor) -> Tensor:
        x = latents / self.config.scaling_factor + self.config.shift_factor
        x = x.to(self.dtype, memory_format=torch.channels_last)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        return self.decoder(x)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Turn pictures `[B, 3, H, W]` in [-1, 1] into mean and standard deviation of latents, `[B, C, h, w]` fp32."""
        x = self.encoder(pixels.to(self.dtype, memory_format=torch.channels_last))
        if self.quant_conv is not None:
            x = self.quant_conv(x)
        mean, log_variance = x.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return (mean - self.config.shift_factor) * self.config.scaling_factor, std * self.config.scaling_factor
