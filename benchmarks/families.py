"""The networks of SD 1.5, SD 2.1 and SDXL at their true sizes with random weights, and a toy for the CPU.

Written once as a checkpoint in diffusers' layout, so that Darkroom and diffusers load the same files in their own way.
What the weights say does not change how long they take; they are scaled so that nothing overflows in fp16.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from darkroom.config import BUILTIN_MODEL
from darkroom.diffusion.text import build_text_model
from darkroom.diffusion.unet import UNet
from darkroom.diffusion.vae import VAE
from safetensors.torch import save_file
from torch import nn

DONE = "written.json"


@dataclass(frozen=True)
class Family:
    """One checkpoint: configs, size in pixels, and the FLOPs that its floor follows from.

    `unet_flops` is of one forward of one model row, `vae_flops` of decoding one picture, `text_flops` of one prompt, a
    multiply-add counting as two; counted on diffusers' classes.
    """

    name: str
    side_px: int
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: tuple[Mapping[str, Any], ...]
    unet_flops: float
    vae_flops: float
    text_flops: float
    prediction_type: str = "epsilon"

    @property
    def is_sdxl(self) -> bool:
        return len(self.text) > 1

    def image_flops(self, num_steps: int) -> float:
        """One picture with guidance: two rows a step, the decoder, two prompts."""
        return 2 * num_steps * self.unet_flops + self.vae_flops + 2 * self.text_flops


def _text(width: int, layers: int, heads: int, activation: str, **more: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": width,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        **more,
    }


_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    # As the autoencoders that users take for fp16: diffusers would decode in fp32 otherwise.
    "force_upcast": False,
}
_SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD21 = {
    **_SD15,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_CLIP_L = _text(768, 12, 12, "quick_gelu")

SD15 = Family("SD1.5 512", 512, _SD15, _VAE, (_CLIP_L,), 0.8033e12, 2.514e12, 0.0133e12)
SD21 = Family(
    "SD2.1 768", 768, _SD21, _VAE, (_text(1024, 23, 16, "gelu"),), 2.149e12, 5.754e12, 0.0451e12, "v_prediction"
)
SDXL = Family(
    "SDXL 1024",
    1024,
    _SDXL,
    {**_VAE, "scaling_factor": 0.13025, "sample_size": 1024},
    (_CLIP_L, _text(1280, 32, 20, "gelu")),
    6.761e12,
    10.47e12,
    0.1112e12,
)
TOY = Family(
    "toy 64",
    64,
    {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    {**_VAE, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "layers_per_block": 1},
    (_text(32, 2, 2, "quick_gelu", vocab_size=2048),),
    4.32e7,
    7.73e7,
    1e6,
)
FAMILIES = {family.name: family for family in (SD15, SD21, SDXL)}


def at_side(family: Family, side_px: int) -> Family:
    """The same networks for smaller pictures. The FLOPs are scaled by area, which overstates attention's share."""
    scale = (side_px / family.side_px) ** 2
    return Family(
        f"{family.name.split()[0]} {side_px}",
        side_px,
        {**family.unet, "sample_size": side_px // 8},
        family.vae,
        family.text,
        scale * family.unet_flops,
        scale * family.vae_flops,
        family.text_flops,
        family.prediction_type,
    )


def write_model(family: Family, directory: Path, device: torch.device, *, seed: int = 0) -> Path:
    """Write the checkpoint below `directory`, unless a whole one is there, and return its own directory.

    Values are fp16 and drawn on `device`.
    """
    target = directory / family.name.replace(" ", "-").replace(".", "_").lower()
    if (target / DONE).exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    generator = torch.Generator(device).manual_seed(seed)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if family.is_sdxl else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    if family.is_sdxl:
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    with torch.device("meta"):
        _write(target / "unet", UNet(family.unet), family.unet, "UNet2DConditionModel", generator)
        _write(target / "vae", VAE(family.vae), family.vae, "AutoencoderKL", generator)
    for number, text in enumerate(family.text):
        suffix = "_2" if number else ""
        class_name = "CLIPTextModelWithProjection" if number else "CLIPTextModel"
        vocabulary = _write_tokenizer(target / f"tokenizer{suffix}")
        config = {**text, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
        with torch.device("meta"):
            _write(
                target / f"text_encoder{suffix}", build_text_model(config, class_name), config, class_name, generator
            )
        index[f"text_encoder{suffix}"] = ["transformers", class_name]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": family.prediction_type,
    }
    _write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(target / "model_index.json", index)
    _write_json(target / DONE, {"seed": seed})
    return target


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def _write(
    directory: Path, module: nn.Module, config: Mapping[str, Any], class_name: str, generator: torch.Generator
) -> None:
    is_text = class_name.startswith("CLIP")
    named = {"architectures": [class_name]} if is_text else {"_class_name": class_name}
    _write_json(directory / "config.json", {**config, **named})
    values = {name: _drawn(name, tensor.shape, generator) for name, tensor in module.state_dict().items()}
    stem = "model" if is_text else "diffusion_pytorch_model"
    save_file(values, directory / f"{stem}.safetensors", metadata={"format": "pt"})


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms start as identity, matrices as torch's own layers do, so that sizes neither grow nor vanish with depth."""
    if len(shape) < 2:
        is_scale = "norm" in name and name.endswith("weight")
        value = 0.02 * torch.randn(shape, generator=generator, device=generator.device) + float(is_scale)
    else:
        value = torch.randn(shape, generator=generator, device=generator.device) / math.sqrt(3 * shape[1:].numel())
    return value.half().cpu().contiguous()


def _write_tokenizer(directory: Path) -> int:
    """The built-in model's tokenizer, told to give 77 tokens. Returns the size of its vocabulary."""
    shutil.copytree(BUILTIN_MODEL / "tokenizer", directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    return len(json.loads((directory / "vocab.json").read_text()))
