"""One full-size UNet forward, ours against diffusers': `python -m benchmarks.full_size_parity [--record]`.

SD 1.5 at 512 px and SDXL at 1024 px latents, random weights, fp32. Both sides share one set of tensors, so that SDXL
(10 GB in fp32) fits into memory once. Prints the largest difference relative to the largest output, and the times of
one cold forward each, which are no benchmark.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch
from darkroom.diffusion.unet import UNet
from diffusers import UNet2DConditionModel

from benchmarks.record import record

SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
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


@torch.inference_mode()
def compare(name: str, config: dict[str, Any]) -> tuple[str, float, str]:
    """Build diffusers' UNet with random weights, ours around the same tensors, and run one row through both."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval()
    size, width = config["sample_size"], config["cross_attention_dim"]
    x, text = torch.randn(1, 4, size, size), torch.randn(1, 77, width)
    timestep = torch.tensor([501.0])
    added = {}
    if config.get("addition_embed_type"):
        added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])}

    started = time.perf_counter()
    expected = theirs(x, timestep, text, added_cond_kwargs=added).sample
    theirs_s = time.perf_counter() - started

    with torch.device("meta"):
        ours = UNet(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    del theirs
    gc.collect()
    ours.eval().fuse()
    started = time.perf_counter()
    projection = ours.time_projection(
        timestep,
        pooled_prompt_embeds=added["text_embeds"][0] if added else None,
        time_ids=added["time_ids"][0] if added else None,
    )
    actual = ours(x.contiguous(memory_format=torch.channels_last), projection, ours.text_kv(text), None)
    ours_s = time.perf_counter() - started
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f"{name}: largest relative difference {error:.2e}; diffusers {theirs_s:.1f} s, darkroom {ours_s:.1f} s")
    return (f"full-size {name} UNet forward, largest relative difference from diffusers", error, "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    figures = []
    for name, config in (("SD 1.5", SD15), ("SDXL", SDXL)):
        figures.append(compare(name, config))
        gc.collect()
    if arguments.record:
        record(figures, "diffusers")


if __name__ == "__main__":
    main()
