"""The denoising network of Stable Diffusion 1.x, 2.x and SDXL.

Parameters keep diffusers' names. What depends on the request alone is computed once per request and sliced in every
call: `text_kv` holds the keys and values of all cross-attention layers, `time_projection` the time shifts of all
residual blocks, for all steps. Source of the structure: diffusers `models/unets/unet_2d_condition.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.diffusion.blocks import (
    Conditioning,
    CrossAttention,
    Downsample,
    ResnetBlock,
    SelfAttention,
    Transformer,
    Upsample,
)
from darkroom.diffusion.config import check_fixed, is_whole, number, positive_int, positive_ints, refusal
from darkroom.diffusion.fused import FusedResnet, FusedTransformer
from darkroom.diffusion.layers import Conv2d, Form, GroupNorm, Layer, Linear, concatenated, load_onednn, prepare

MAX_LAYERS = 64

# What this network does in one way only: the key of the config, and the values that mean that way.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    # Scores are always fp32 in darkroom_kernels.attention, which is what True asks for.
    "upcast_attention": (False, True),
}
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True)
class BlockConfig:
    """One block: whether each residual block is followed by a transformer, and its sizes.

    `transformer_layers` has one entry per residual block of a down block; an up block has one residual block more.
    """

    channels: int
    num_layers: int
    has_attention: bool
    heads: int
    transformer_layers: tuple[int, ...]
    only_cross_attention: bool


@dataclass(frozen=True)
class UNetConfig:
    """A diffusers UNet config with the defaults filled in and everything per block spelled out."""

    in_channels: int
    out_channels: int
    sample_size: int | None
    center_input_sample: bool
    flip_sin_to_cos: bool
    freq_shift: float
    down_blocks: tuple[BlockConfig, ...]
    mid_block: BlockConfig | None
    up_blocks: tuple[BlockConfig, ...]
    text_dim: int
    use_linear_projection: bool
    norm_num_groups: int
    norm_eps: float
    downsample_padding: int
    conv_in_kernel: int
    conv_out_kernel: int
    time_embedding_dim: int
    time_cond_proj_dim: int | None
    addition_time_embed_dim: int | None
    addition_input_dim: int | None

    @property
    def head_dims(self) -> set[int]:
        """The widths of an attention head that occur."""
        blocks = (*self.down_blocks, *self.up_blocks, *([self.mid_block] if self.mid_block else []))
        return {block.channels // block.heads for block in blocks if block.has_attention}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read `unet/config.json`. Raises `ModelError` naming the first key that cannot be honoured."""
        check_fixed(config, FIXED)
        channels = positive_ints(config, "block_out_channels", (320, 640, 1280, 1280))
        count = len(channels)
        down_types = _block_types(config, "down_block_types", DOWN_BLOCKS, count, "CrossAttnDownBlock2D", "DownBlock2D")
        up_types = _block_types(config, "up_block_types", UP_BLOCKS, count, "CrossAttnUpBlock2D", "UpBlock2D")
        # diffusers reads attention_head_dim as the number of heads; num_attention_heads, where given, says it outright.
        heads_key = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
        heads = positive_ints(config, heads_key, 8, count)
        layers = positive_ints(config, "layers_per_block", 2, count, limit=MAX_LAYERS)
        text_dims = set(positive_ints(config, "cross_attention_dim", 1280, count))
        if len(text_dims) > 1:
            raise refusal(config, "cross_attention_dim", "one width for all blocks")
        cross_only = config.get("only_cross_attention", False)
        cross_only = [cross_only] * count if isinstance(cross_only, bool) else cross_only
        if not isinstance(cross_only, list | tuple) or len(cross_only) != count:
            raise refusal(config, "only_cross_attention", f"a boolean or {count} of them")
        depth = _transformer_layers(config, "transformer_layers_per_block", count)
        reversed_key = "reverse_transformer_layers_per_block"
        up_depth = depth[::-1] if config.get(reversed_key) is None else _transformer_layers(config, reversed_key, count)

        def blocks(
            names: Sequence[bool], order: Sequence[int], depth: Sequence[int | Sequence[int]], extra: int
        ) -> tuple[BlockConfig, ...]:
            result = []
            for place, index in enumerate(order):
                entry, resnets = depth[place], layers[index] + extra
                per_resnet = (entry,) * resnets if isinstance(entry, int) else tuple(entry)
                if names[place] and len(per_resnet) < resnets:
                    raise refusal(config, "transformer_layers_per_block", f"{resnets} entries in block {place}")
                result.append(
                    BlockConfig(
                        channels=channels[index],
                        num_layers=resnets,
                        has_attention=names[place],
                        heads=heads[index],
                        transformer_layers=per_resnet,
                        only_cross_attention=bool(cross_only[index]),
                    )
                )
            return tuple(result)

        downs = blocks(down_types, range(count), depth, 0)
        ups = blocks(up_types, range(count)[::-1], up_depth, 1)
        mid = None
        mid_type = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        if mid_type not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None):
            raise refusal(config, "mid_block_type", "UNetMidBlock2DCrossAttn, UNetMidBlock2D or null")
        if mid_type is not None:
            mid = BlockConfig(
                channels=channels[-1],
                num_layers=2 if mid_type == "UNetMidBlock2DCrossAttn" else 1,
                has_attention=mid_type == "UNetMidBlock2DCrossAttn",
                heads=heads[-1],
                transformer_layers=(depth[-1] if isinstance(depth[-1], int) else depth[-1][0],),
                only_cross_attention=False,
            )
        for block in (*downs, *ups, *([mid] if mid else [])):
            if block.has_attention and block.channels % block.heads:
                raise refusal(config, heads_key, f"divisors of block_out_channels {list(channels)}")

        addition = config.get("addition_embed_type")
        if addition not in (None, "text_time"):
            raise refusal(config, "addition_embed_type", "text_time or null")
        sample_size = config.get("sample_size")
        return cls(
            in_channels=positive_int(config, "in_channels", 4),
            out_channels=positive_int(config, "out_channels", 4),
            sample_size=sample_size if isinstance(sample_size, int) and sample_size > 0 else None,
            center_input_sample=bool(config.get("center_input_sample", False)),
            flip_sin_to_cos=bool(config.get("flip_sin_to_cos", True)),
            freq_shift=number(config, "freq_shift", 0.0),
            down_blocks=downs,
            mid_block=mid,
            up_blocks=ups,
            text_dim=text_dims.pop(),
            use_linear_projection=bool(config.get("use_linear_projection", False)),
            norm_num_groups=positive_int(config, "norm_num_groups", 32),
            norm_eps=number(config, "norm_eps", 1e-5),
            downsample_padding=positive_int(config, "downsample_padding", 1, minimum=0, limit=1),
            conv_in_kernel=positive_int(config, "conv_in_kernel", 3, limit=15),
            conv_out_kernel=positive_int(config, "conv_out_kernel", 3, limit=15),
            time_embedding_dim=positive_int(config, "time_embedding_dim", channels[0] * 4),
            time_cond_proj_dim=positive_int(config, "time_cond_proj_dim", 0, minimum=0) or None,
            addition_time_embed_dim=positive_int(config, "addition_time_embed_dim", None) if addition else None,
            addition_input_dim=positive_int(config, "projection_class_embeddings_input_dim", None)
            if addition
            else None,
        )


def _block_types(
    config: Mapping[str, Any], key: str, known: Mapping[str, bool], count: int, most: str, end: str
) -> tuple[bool, ...]:
    """Whether each block has attention. diffusers' default has none at the coarsest level."""
    default = [end, *[most] * 3] if key.startswith("up") else [*[most] * 3, end]
    names = config.get(key, default)
    if not isinstance(names, list | tuple) or len(names) != count or not set(map(str, names)) <= set(known):
        raise refusal(config, key, f"{count} of {', '.join(known)}")
    return tuple(known[name] for name in names)


def _transformer_layers(config: Mapping[str, Any], key: str, count: int) -> tuple[int | tuple[int, ...], ...]:
    """Transformer layers of each block, in the block's own order; a nested list gives them per residual block."""
    value = config.get(key, 1)
    if isinstance(value, int):
        value = [value] * count
    if not isinstance(value, list | tuple) or len(value) != count:
        raise refusal(config, key, f"{count} entries")
    result: list[int | tuple[int, ...]] = []
    for entry in value:
        numbers = [entry] if isinstance(entry, int) else entry
        if not isinstance(numbers, list | tuple) or not all(is_whole(n, 1, MAX_LAYERS) for n in numbers):
            raise refusal(config, key, f"whole numbers from 1 to {MAX_LAYERS}")
        result.append(entry if isinstance(entry, int) else tuple(numbers))
    return tuple(result)


class UNetBlock(nn.Module):
    """Residual blocks, each followed by a transformer where the config says so, and a change of resolution at the end.

    `in_channels` has one entry per residual block. Serves as down, middle and up block.
    """

    def __init__(
        self,
        unet: UNetConfig,
        block: BlockConfig,
        in_channels: Sequence[int],
        attention: str,
        *,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(width, block.channels, unet.time_embedding_dim, unet.norm_num_groups, unet.norm_eps)
            for width in in_channels
        )
        if block.has_attention:
            self.attentions = nn.ModuleList(
                Transformer(
                    block.channels,
                    unet.text_dim,
                    block.heads,
                    num_layers,
                    unet.norm_num_groups,
                    attention,
                    use_linear_projection=unet.use_linear_projection,
                    only_cross_attention=block.only_cross_attention,
                )
                for _, num_layers in zip(in_channels, block.transformer_layers, strict=False)
            )
        # Plain lists, for the calls; the module lists beside them give the parameters diffusers' names.
        transformers = list(self.attentions) if block.has_attention else []
        self.layers: list[tuple[Any, Any]] = list(zip_longest(self.resnets, transformers))
        self.resamplers: list[Downsample | Upsample] = []
        if downsample:
            self.resamplers.append(Downsample(block.channels, unet.downsample_padding))
            self.downsamplers = nn.ModuleList(self.resamplers)
        if upsample:
            self.resamplers.append(Upsample(block.channels))
            self.upsamplers = nn.ModuleList(self.resamplers)

    def fuse(self, input_bias: Tensor | None = None) -> None:
        """Give the blocks the form of CUDA. `input_bias` is what the first one's input lacks."""
        transformers = [None if plain is None else FusedTransformer(plain) for _, plain in self.layers]
        resnets = []
        for (plain, _), transformer in zip(self.layers, transformers, strict=True):
            output_bias = None if transformer is None else transformer.output_bias
            resnets.append(FusedResnet(plain, input_bias, output_bias))
            input_bias = None
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(entry for entry in transformers if entry is not None)
        self.layers = list(zip(resnets, transformers, strict=True))


class TimestepEmbedding(Layer):
    """Two matrices with SiLU between, and LCM's optional one for the guidance scale."""

    def __init__(self, in_dim: int, dim: int, cond_proj_dim: int | None = None):
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.cond_proj = Linear(cond_proj_dim, in_dim, bias=False) if cond_proj_dim else None
        self.linear_2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))  # type: ignore[no-any-return]


class Compiled(Protocol):
    """Another way to compute a UNet's forward pass, for the inputs that it says it fits."""

    def fits(self, x: Tensor, text_kv: Tensor, text_lengths: Tensor | None, text_slots: Tensor | None, /) -> bool: ...

    def __call__(self, x: Tensor, time_projection: Tensor, text_kv: Tensor, /, *texts: Tensor | None) -> Tensor: ...


class UNet(nn.Module):
    """See the module's docstring. Load weights under diffusers' names, call `fuse()` once, then infer.

    `config` is the contents of `unet/config.json`; `attention` names the implementation of
    `darkroom_kernels.attention`, `kernels` that of its other operations. Results are inference tensors: read them or
    compute with them under `torch.inference_mode`. Raises `ModelError` on a config that cannot be honoured.
    """

    def __init__(self, config: Mapping[str, Any] | UNetConfig, *, attention: str = "auto", kernels: str = "auto"):
        super().__init__()
        self.config = config = config if isinstance(config, UNetConfig) else UNetConfig.from_dict(config)
        downs, mid, ups = config.down_blocks, config.mid_block, config.up_blocks
        first, last = downs[0].channels, downs[-1].channels
        self.conv_in = Conv2d(
            config.in_channels, first, config.conv_in_kernel, padding=(config.conv_in_kernel - 1) // 2
        )
        self.time_embedding = TimestepEmbedding(first, config.time_embedding_dim, config.time_cond_proj_dim)
        if config.addition_input_dim is not None:
            self.add_embedding = TimestepEmbedding(config.addition_input_dim, config.time_embedding_dim)

        self._downs: list[UNetBlock] = []
        skips, width = [first], first
        for index, block in enumerate(downs):
            inputs = [width] + [block.channels] * (block.num_layers - 1)
            is_last = index == len(downs) - 1
            self._downs.append(UNetBlock(config, block, inputs, attention, downsample=not is_last))
            width = block.channels
            skips += [width] * (block.num_layers + (not is_last))
        self.mid_block = UNetBlock(config, mid, [last] * mid.num_layers, attention) if mid else None
        self._ups: list[UNetBlock] = []
        for index, block in enumerate(ups):
            inputs = []
            for _ in range(block.num_layers):
                inputs.append(width + skips.pop())
                width = block.channels
            self._ups.append(UNetBlock(config, block, inputs, attention, upsample=index < len(ups) - 1))

        self.down_blocks, self.up_blocks = nn.ModuleList(self._downs), nn.ModuleList(self._ups)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = Conv2d(
            first, config.out_channels, config.conv_out_kernel, padding=(config.conv_out_kernel - 1) // 2
        )
        self._kernels = kernels
        self._time_layers: Linear | None = None
        self._text_layers: Linear | None = None
        self._time_widths: list[int] = []
        self._text_widths: list[int] = []
        self.dtype = torch.float32
        # Set between two calls, from any thread: the next call takes it up.
        self.compiled: Compiled | None = None

    def fuse(self, *, for_cuda: bool | None = None, onednn: bool = True) -> UNet:
        """Join the matrices that share an input: queries, keys and values of a self-attention; keys and values of all
        cross-attentions; the time shifts of all residual blocks. Then give the blocks their form: `for_cuda` that of
        `darkroom.diffusion.fused`, which is the default for weights that are not on a CPU; without `onednn` weights
        stay as torch's compiler can read them. Call it once, on loaded weights. The parts are dropped, so afterwards
        parameters no longer carry diffusers' names. Returns self.
        """
        if self._time_layers is not None:
            return self
        for_cuda = self.conv_in.weight.device.type != "cpu" if for_cuda is None else for_cuda
        time_layers: list[Linear] = []
        text_layers: list[Linear] = []
        for module in self.modules():
            if isinstance(module, ResnetBlock) and module.time_emb_proj is not None:
                module.time_index = len(time_layers)
                time_layers.append(module.time_emb_proj)
                if for_cuda:
                    module.time_emb_proj.add_to_bias(module.conv1.take_bias())
                module.time_emb_proj = None
            elif isinstance(module, CrossAttention) and module.to_k is not None and module.to_v is not None:
                module.text_index = len(text_layers)
                text_layers += [module.to_k, module.to_v]
                module.to_k = module.to_v = None
            elif isinstance(module, SelfAttention):
                module.fuse()
        self._time_widths = [layer.out_features for layer in time_layers]
        self._text_widths = [layer.out_features for layer in text_layers]
        self._time_layers = concatenated(time_layers)
        self._text_layers = concatenated(text_layers) if text_layers else None
        self.dtype = self.conv_in.weight.dtype
        if for_cuda:
            self._fuse_blocks()
        prepare(self, Form.named(load_onednn() if onednn and not for_cuda else None, self._kernels))
        return self

    def _fuse_blocks(self) -> None:
        for block in (*self._downs, *([self.mid_block] if self.mid_block else ())):
            block.fuse()
        bias = None
        for block in self._ups:
            if bias is not None:
                # The first residual block reads what was upsampled, and beside it a skip that lacks nothing.
                bias = F.pad(bias, (0, block.layers[0][0].conv1.weight.shape[1] - bias.shape[0]))
            block.fuse(bias)
            for upsample in block.resamplers:
                bias = upsample.conv.take_bias()

    @property
    def time_width(self) -> int:
        """Columns of `time_projection`, known after `fuse()`."""
        return sum(self._time_widths)

    @property
    def text_kv_width(self) -> int:
        """Columns of `text_kv`, known after `fuse()`."""
        return sum(self._text_widths)

    @torch.inference_mode()
    def text_kv(self, prompt_embeds: Tensor) -> Tensor:
        """Compute keys and values of every cross-attention layer. `prompt_embeds` `[B, L, text_dim]` → `[B, L,
        text_kv_width]` in the network's dtype. Once per request.
        """
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != self.config.text_dim:
            raise ValueError(f"expected prompt_embeds [B, L, {self.config.text_dim}], got {list(prompt_embeds.shape)}")
        prompt_embeds = prompt_embeds.to(self.dtype)
        if self._text_layers is None:
            return prompt_embeds.new_empty(*prompt_embeds.shape[:2], 0)
        return self._text_layers(prompt_embeds)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def time_projection(
        self,
        timesteps: Tensor,
        *,
        pooled_prompt_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance_embedding_scale: float | None = None,
    ) -> Tensor:
        """Compute the time shifts of every residual block, for all steps of a request at once.

        `timesteps` `[N]` fp32; SDXL adds `pooled_prompt_embeds` `[P]` and `time_ids` `[6]` (original height and width,
        crop top and left, target height and width). `guidance_embedding_scale` is the request's guidance scale, which a
        latent consistency model embeds (as scale − 1) instead of being called twice; others ignore it. Returns
        `[N, time_width]` in the network's dtype. Raises `ValueError` when SDXL's two are missing.
        """
        config = self.config
        if self._time_layers is None:
            raise RuntimeError("fuse() comes before the first call")
        x = sinusoidal_embedding(
            timesteps, config.down_blocks[0].channels, flip_sin_to_cos=config.flip_sin_to_cos, shift=config.freq_shift
        ).to(self.dtype)
        if self.time_embedding.cond_proj is not None and guidance_embedding_scale is not None:
            assert config.time_cond_proj_dim is not None  # noqa: S101
            scale = torch.full((1,), (guidance_embedding_scale - 1.0) * 1000.0, device=x.device)
            guidance = sinusoidal_embedding(scale, config.time_cond_proj_dim, flip_sin_to_cos=False, shift=1.0)
            x = x + self.time_embedding.cond_proj(guidance.to(self.dtype))
        x = self.time_embedding(x)
        if config.addition_time_embed_dim is not None:
            if pooled_prompt_embeds is None or time_ids is None:
                raise ValueError("this UNet (text_time) needs pooled_prompt_embeds and time_ids")
            sizes = sinusoidal_embedding(
                time_ids.flatten().to(x.device),
                config.addition_time_embed_dim,
                flip_sin_to_cos=config.flip_sin_to_cos,
                shift=config.freq_shift,
            )
            added = torch.cat([pooled_prompt_embeds.flatten().to(self.dtype), sizes.flatten().to(self.dtype)])
            x = x + self.add_embedding(added)
        return self._time_layers(F.silu(x))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def forward(
        self,
        x: Tensor,
        time_projection: Tensor,
        text_kv: Tensor,
        text_lengths: Tensor | None = None,
        text_slots: Tensor | None = None,
    ) -> Tensor:
        """Predict for a batch of independent rows.

        `x` `[B, in_channels, H, W]` any float dtype; `time_projection` `[B, time_width]`, one line of `time_projection`
        per row; `text_kv` `[S, L, text_kv_width]`; `text_lengths` `[B]` int32 masks the padding of shorter texts, None
        when all have length L; `text_slots` `[B]` int64 is the text of each row, None when S is B and row b reads text
        b. Returns `[B, out_channels, H, W]` channels-last in the network's dtype.
        """
        compiled = self.compiled
        if compiled is not None and compiled.fits(x, text_kv, text_lengths, text_slots):
            return compiled(x.to(self.dtype), time_projection, text_kv, text_lengths, text_slots)
        conditioning = Conditioning(
            torch.split(time_projection, self._time_widths, 1),
            torch.split(text_kv, self._text_widths, 2) if self._text_widths else (),
            text_lengths,
            text_slots,
        )
        if self.config.center_input_sample:
            x = 2 * x - 1.0
        x = self.conv_in(x.to(self.dtype, memory_format=torch.channels_last))
        skips = [x]
        for block in self._downs:
            for resnet, attention in block.layers:
                x = resnet(x, conditioning)
                if attention is not None:
                    x = attention(x, conditioning)
                skips.append(x)
            for downsample in block.resamplers:
                x = downsample(x)
                skips.append(x)
        if self.mid_block is not None:
            for resnet, attention in self.mid_block.layers:
                x = resnet(x, conditioning)
                if attention is not None:
                    x = attention(x, conditioning)
        for block in self._ups:
            for resnet, attention in block.layers:
                x = resnet(torch.cat([x, skips.pop()], 1), conditioning)
                if attention is not None:
                    x = attention(x, conditioning)
            for upsample in block.resamplers:
                x = upsample(x, skips[-1].shape[2:])
        return self.conv_out(self.conv_norm_out(x, silu=True))  # type: ignore[no-any-return]


def sinusoidal_embedding(values: Tensor, dim: int, *, flip_sin_to_cos: bool, shift: float) -> Tensor:
    """Embed numbers as sines and cosines: `[N]` → `[N, dim]` fp32. Source: diffusers `get_timestep_embedding`."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / (half - shift)
    )
    angles = values.float()[:, None] * frequencies
    parts = [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=-1), (0, dim % 2))
