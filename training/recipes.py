"""The two recipes: which world a model draws, what its networks are, and how much of what they are taught with."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.world import FULL, SMALL, World


@dataclass(frozen=True)
class Amount:
    """Scenes that a stage makes once, and how many of them are in an update."""

    scenes: int
    batch: int


@dataclass(frozen=True)
class Recipe:
    """`text`, `vae` and `unet` are what the classes of transformers and diffusers are configured with.

    `amounts` has each stage of `python -m training`, `shares` what it takes of the `minutes`. `substeps` are the steps
    of the teacher that the student learns to do in one, and it learns from what the teacher did `repeats` times.
    """

    name: str
    world: World
    text: dict[str, int]
    vae: dict[str, Any]
    unet: dict[str, Any]
    substeps: int
    repeats: int
    minutes: float
    shares: dict[str, float]
    amounts: dict[str, Amount]


def _text(width: int, layers: int) -> dict[str, int]:
    """Heads of 64, as CLIP has them."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }


def _vae(world: World, latent_channels: int, widths: tuple[int, ...]) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": list(widths),
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 16,
        "sample_size": world.image_px,
        "mid_block_add_attention": False,
    }


def _unet(vae: dict[str, Any], text: dict[str, int], levels: str, widths: tuple[int, ...]) -> dict[str, Any]:
    """`levels`: for each resolution "X" with attention to the prompt, "-" without."""
    down = [{"X": "CrossAttnDownBlock2D", "-": "DownBlock2D"}[level] for level in levels]
    return {
        "sample_size": vae["sample_size"] >> (len(vae["block_out_channels"]) - 1),
        "in_channels": vae["latent_channels"],
        "out_channels": vae["latent_channels"],
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": list(widths),
        "layers_per_block": 1,
        "cross_attention_dim": text["hidden_size"],
        # Despite its name, diffusers reads this as the number of heads of each level: heads of 64 here.
        "attention_head_dim": [2] * len(widths),
        "norm_num_groups": 32,
        "use_linear_projection": True,
    }


_FULL_TEXT, _FULL_VAE = _text(192, 4), _vae(FULL, 12, (32, 64, 96, 96))
_SMALL_TEXT, _SMALL_VAE = _text(128, 3), _vae(SMALL, 8, (16, 48, 64))
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="full",
            world=FULL,
            text=_FULL_TEXT,
            vae=_FULL_VAE,
            unet=_unet(_FULL_VAE, _FULL_TEXT, "-XX", (96, 128, 128)),
            substeps=6,
            repeats=1,
            minutes=16,
            shares={"text": 0.05, "vae": 0.25, "unet": 0.55, "student": 0.15},
            amounts={
                "text": Amount(300_000, 512),
                "vae": Amount(200_000, 96),
                "unet": Amount(500_000, 1024),
                "student": Amount(100_000, 1024),
            },
        ),
        # A sprite's place on the grid is a whole number of latents of this autoencoder: it looks the same everywhere.
        Recipe(
            name="small",
            world=SMALL,
            text=_SMALL_TEXT,
            vae=_SMALL_VAE,
            unet=_unet(_SMALL_VAE, _SMALL_TEXT, "-XX", (64, 128, 128)),
            substeps=3,
            repeats=3,
            minutes=210,
            shares={"text": 0.06, "vae": 0.26, "unet": 0.58, "student": 0.1},
            amounts={
                "text": Amount(60_000, 128),
                "vae": Amount(40_000, 8),
                "unet": Amount(40_000, 32),
                "student": Amount(20_000, 32),
            },
        ),
    )
}


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="full" if torch.cuda.is_available() else "small",
        help="full for a GPU (66 objects, 128 px), small for a CPU",
    )


def recipe_of(model: Path) -> Recipe:
    """What a folder's weights were made by, from the record beside them. Raises `ValueError` where there is none."""
    path = model / "training.json"
    if not path.exists():
        raise ValueError(f"{path} is missing: nothing tells which recipe's world these weights draw")
    return RECIPES[json.loads(path.read_text())["unet"]["recipe"]]
