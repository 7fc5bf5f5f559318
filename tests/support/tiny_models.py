"""Writes randomly initialised, scaled-down checkpoints in diffusers' layout, with diffusers' own `save_pretrained`.

The three families differ where the real ones do: SD 1.x projects with convolutions and has one head count, SD 2.x
projects with matrices, has a head count per block and predicts v, SDXL has two text encoders, several transformer
layers per block and embeds the picture's size. Weights differ with `seed`; norms and biases are random too, so that no
test passes because a bias was zero.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

Family = Literal["sd1", "sd2", "sdxl"]
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")

MERGES = (("a", "t</w>"), ("o", "n</w>"), ("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("c", "at</w>"))
POOLED_WIDTH = 24
TIME_EMBED_DIM = 8

UNET_CONFIGS: dict[Family, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "sample_size": 8,
    },
    "sd2": {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
        "norm_num_groups": 8,
        "sample_size": 8,
    },
    "sdxl": {
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 56,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_EMBED_DIM,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * TIME_EMBED_DIM,
        "norm_num_groups": 8,
        "sample_size": 8,
    },
}

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}


def fresh_seed() -> int:
    """A new seed each run, printed so that a failure can be repeated."""
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}")
    return seed


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter of `module` a random value of the size a trained one has, and return it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval().requires_grad_(False)


def tiny_unet(family: Family, seed: int, **overrides: Any) -> UNet2DConditionModel:
    """diffusers' own UNet of a family, scaled down; `overrides` replace entries of its config."""
    return randomise(UNet2DConditionModel(**{**UNET_CONFIGS[family], **overrides}), seed)


def tiny_vae(seed: int, **overrides: Any) -> AutoencoderKL:
    """diffusers' own autoencoder, scaled down: 8 pixels per latent, 4 latent channels."""
    return randomise(AutoencoderKL(**{**VAE_CONFIG, **overrides}), seed)


def tiny_tokenizer(directory: Path, *, max_tokens: int = 77) -> CLIPTokenizer:
    """A byte-level tokenizer in CLIP's form: each byte, each byte at a word's end, a few merges, two special tokens."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(code) for code in visible] + [chr(256 + index) for index in range(256 - len(visible))]
    tokens = alphabet + [f"{token}</w>" for token in alphabet] + [left + right for left, right in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in MERGES))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {**special, "pad_token": "<|endoftext|>", "model_max_length": max_tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(directory)


def tiny_text_encoder(
    seed: int, *, width: int, vocab_size: int, with_projection: bool = False, max_tokens: int = 77
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """transformers' CLIP text encoder with three layers."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=POOLED_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        hidden_act="gelu" if with_projection else "quick_gelu",
        # Published checkpoints carry CLIP's historical 2 here and mean "the largest token id".
        eos_token_id=2,
        bos_token_id=0,
    )
    return randomise((CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config), seed)


def write_tiny_model(
    directory: Path,
    family: Family = "sd1",
    *,
    seed: int = 0,
    variant: str | None = None,
    max_shard_size: str = "10GB",
    max_tokens: int = 77,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """Write a whole checkpoint to `directory` and return it.

    `variant="fp16"` writes half-precision `*.fp16.safetensors`, a small `max_shard_size` splits the weights over files,
    `unet`, `vae` and `scheduler` replace entries of those configs.
    """
    transformers_logging.disable_progress_bar()
    tokenizer = tiny_tokenizer(directory / "tokenizer", max_tokens=max_tokens)
    vocab_size = len(tokenizer)
    parts: dict[str, Any] = {
        "unet": tiny_unet(family, seed, **(unet or {})),
        "vae": tiny_vae(seed + 1, **{"scaling_factor": 0.13025 if family == "sdxl" else 0.18215, **(vae or {})}),
        "tokenizer": tokenizer,
        "text_encoder": tiny_text_encoder(seed + 2, width=32, vocab_size=vocab_size, max_tokens=max_tokens),
    }
    clock = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if family == "sdxl":
        parts["text_encoder_2"] = tiny_text_encoder(
            seed + 3, width=24, vocab_size=vocab_size, with_projection=True, max_tokens=max_tokens
        )
        parts["tokenizer_2"] = tiny_tokenizer(directory / "tokenizer_2", max_tokens=max_tokens)
        parts["scheduler"] = EulerDiscreteScheduler(**{**clock, "timestep_spacing": "leading", **(scheduler or {})})
        pipeline = StableDiffusionXLPipeline(**parts)
    else:
        parts["scheduler"] = (
            PNDMScheduler(**{**clock, "skip_prk_steps": True, "set_alpha_to_one": False, **(scheduler or {})})
            if family == "sd1"
            else DDIMScheduler(
                **{
                    **clock,
                    "prediction_type": "v_prediction",
                    "clip_sample": False,
                    "set_alpha_to_one": False,
                    **(scheduler or {}),
                }
            )
        )
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    if variant == "fp16":
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.half()
    pipeline.save_pretrained(directory, safe_serialization=True, variant=variant, max_shard_size=max_shard_size)
    return directory
