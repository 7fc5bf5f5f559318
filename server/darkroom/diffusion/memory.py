"""How much GPU memory a worker needs, worked out before a weight is read.

Weights are counted. Activations are found by running the networks once on meta tensors, in their CUDA form, and adding
up the storages that live at the same time; every activation has one row axis, so one row tells for all. What cannot be
known here (context, libraries' workspaces, graphs, fragmentation) is an allowance. The sum is an estimate: on a device,
compare `torch.cuda.max_memory_reserved`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from darkroom.diffusion.text import build_text_model
from darkroom.diffusion.unet import UNet
from darkroom.diffusion.vae import MAX_DECODE_PIXELS, VAE
from darkroom.errors import ConfigError

# CUDA context and loaded kernels about 0.6 GiB, workspaces of cuBLAS and cuDNN about 0.5 GiB, captured graphs and their
# static inputs the rest. A guess until it is measured on a device.
FIXED_ALLOWANCE_BYTES = 3 << 29
# What the allocator loses between its blocks, of the activations.
FRAGMENTATION = 0.1
# Of the free memory, left to others when no budget is set.
MARGIN = 0.05
# torch's CUDA allocator hands out multiples of this.
BLOCK_BYTES = 512
# What CLIP reads of a prompt.
TEXT_TOKENS = 77
# A worker holds twice the rows of a tick, and a prompt for each.
HELD_PER_ROW = 2
# Time embeddings that a row keeps, one for each of its evaluations; jobs of more take more.
USUAL_EVALUATIONS = 50
GIB = float(1 << 30)


@dataclass(frozen=True)
class ModelMemory:
    """Bytes that one model takes: `weights` of all networks; `text` keys and values of one prompt; `row` latents,
    history and time embeddings of one row; `unet` activations of one model row in a UNet call; `decode` activations of
    one VAE call.
    """

    name: str
    weights: int
    text: int
    row: int
    unet: int
    decode: int


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages made under it: `peak_bytes` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            # On meta tensors torch takes the form that holds all scores; on CUDA only the result is new.
            result = args[0].transpose(1, 2).new_empty(args[0].transpose(1, 2).shape).transpose(1, 2)
        else:
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default):
                # Convolutions keep their layout on CUDA and lose it on meta tensors.
                result = torch.empty_like(result, memory_format=torch.channels_last)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given | self._known:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        num_bytes = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._known.add(storage._cdata)
        self._live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._remove, storage._cdata, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._live_bytes -= num_bytes


def weight_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def unet_activation_bytes(unet: UNet, num_rows: int, height: int, width: int) -> int:
    """Peak of one call of a fused UNet on the meta device, with `num_rows` latents of `height` × `width`."""
    meta = torch.device("meta")
    x = torch.empty(num_rows, unet.config.in_channels, height, width, dtype=unet.dtype, device=meta)
    time = torch.empty(num_rows, unet.time_width, dtype=unet.dtype, device=meta)
    text = torch.empty(num_rows, TEXT_TOKENS, unet.text_kv_width, dtype=unet.dtype, device=meta)
    slots = torch.empty(num_rows, dtype=torch.int64, device=meta)
    with LiveStorages() as storages:
        unet(x, time, text, None, slots)
    return int(storages.peak_bytes)


def decode_activation_bytes(vae: VAE, num_rows: int, height: int, width: int) -> int:
    """Peak of one decoding of `num_rows` latents by a fused VAE on the meta device."""
    latents = torch.empty(num_rows, vae.config.latent_channels, height, width, device="meta")
    with LiveStorages() as storages:
        vae.decode(latents)
    return int(storages.peak_bytes)


def encode_activation_bytes(vae: VAE, height: int, width: int) -> int:
    """Peak of encoding one picture of `height` × `width` pixels by a fused VAE on the meta device."""
    pixels = torch.empty(1, vae.config.in_channels, height, width, device="meta")
    with LiveStorages() as storages:
        vae.encode(pixels)
    return int(storages.peak_bytes)


def measure(
    name: str,
    unet_config: Mapping[str, Any],
    vae_config: Mapping[str, Any],
    text_configs: Sequence[tuple[str, Mapping[str, Any]]],
    sizes_px: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    vae_tile_px: int | None,
    kernels: str = "auto",
) -> ModelMemory:
    """Work out a model's memory from its configs.

    `text_configs`: class name and config of each text encoder. `sizes_px`: (width, height) of the pictures that are
    captured as graphs; activations are those of the largest. Raises `ModelError` on a config that cannot be honoured.
    """
    with torch.device("meta"):
        texts = [build_text_model(config, class_name) for class_name, config in text_configs]
        unet = UNet(unet_config, kernels=kernels).to(dtype)
        vae = VAE(vae_config, kernels=kernels, tile_px=vae_tile_px).to(vae_dtype)
    weights = sum(map(weight_bytes, (unet, vae, *(text.to(dtype) for text in texts))))
    unet.fuse()
    vae.fuse()
    scale = vae.config.scale_factor
    row = unet_rows = decode = 0
    for width_px, height_px in sizes_px:
        height, width = height_px // scale, width_px // scale
        # Latents, two earlier denoised ones, those of the end, and of a masked row its init image and noise, fp32.
        row = max(row, 6 * 4 * vae.config.latent_channels * height * width)
        unet_rows = max(unet_rows, unet_activation_bytes(unet, 1, height, width))
        together = max(1, MAX_DECODE_PIXELS // (width_px * height_px))
        decode = max(decode, decode_activation_bytes(vae, together, height, width))
        # The same thread encodes, one picture at a time.
        decode = max(decode, encode_activation_bytes(vae, height_px, width_px))
    row += USUAL_EVALUATIONS * unet.time_width * dtype.itemsize
    text = TEXT_TOKENS * unet.text_kv_width * dtype.itemsize
    return ModelMemory(name, weights, text, row, unet_rows, decode)


@dataclass(frozen=True)
class Needed:
    """Bytes that models take together: `fixed` whatever the rows, and `per_row` for each model row of a tick.

    Graphs share one pool, and so do decodings: the hungriest model counts for all.
    """

    weights: int
    fixed: int
    per_row: int

    @classmethod
    def by(cls, models: Sequence[ModelMemory], prompt_cache_bytes: int) -> Needed:
        weights = sum(model.weights for model in models)
        decode = max(model.decode for model in models) * (1 + FRAGMENTATION)
        unet = max(model.unet for model in models) * (1 + FRAGMENTATION)
        held = HELD_PER_ROW * sum(model.text + model.row for model in models)
        fixed = weights + len(models) * prompt_cache_bytes + int(decode) + FIXED_ALLOWANCE_BYTES
        return cls(weights, fixed, int(unet) + held)

    def total(self, rows: int) -> int:
        return self.fixed + rows * self.per_row

    def most_rows(self, budget_bytes: int) -> int:
        """The most model rows a tick may have within a budget; 0 or less when none fit."""
        return (budget_bytes - self.fixed) // self.per_row


def check_memory(
    models: Sequence[ModelMemory],
    *,
    rows: int,
    rows_setting: str,
    prompt_cache_bytes: int,
    budget_bytes: int,
    free_bytes: int,
) -> Needed:
    """Refuse models that cannot be served in `free_bytes` of GPU memory with ticks of `rows` model rows.

    `budget_bytes` 0 means all that is free, less a margin; `rows_setting` names the variable that `rows` is of. Raises
    `ConfigError` with the numbers and what would fit.
    """
    needed = Needed.by(models, prompt_cache_bytes)
    limit = min(budget_bytes, free_bytes) if budget_bytes else int(free_bytes * (1 - MARGIN))
    total = needed.total(rows)
    if total <= limit:
        return needed
    most = needed.most_rows(limit)
    remedy = f"{rows_setting}={most} would fit" if most >= 2 else "no number of rows would fit, serve fewer models"
    raise ConfigError(
        f"{' and '.join(model.name for model in models)} would take about {total / GIB:.1f} GiB of GPU memory with "
        f"{rows_setting}={rows} ({needed.weights / GIB:.1f} GiB of weights, {needed.per_row / GIB:.2f} GiB a row), "
        f"and {limit / GIB:.1f} GiB may be used; {remedy}"
    )
