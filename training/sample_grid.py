"""Draw a contact sheet from an exported folder: `python -m training.sample_grid --out sheet.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from training import common
from training.train_unet import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("server/darkroom/models/emoji-world"))
    parser.add_argument("--out", type=Path, required=True, help="PNG to write, one prompt a tile")
    parser.add_argument("--prompts", nargs="*", default=list(PROMPTS))
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt, side by side")
    parser.add_argument("--steps", type=int, default=NUM_INFERENCE_STEPS)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--karras", action="store_true", help="Karras sigmas instead of evenly spaced times")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 8")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 8")
    parser.add_argument("--columns", type=int, default=8)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(mininterval=10)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=args.karras
    )
    tiles: list[np.ndarray] = []
    for start in range(0, len(args.prompts), 16):
        prompts = [prompt for prompt in args.prompts[start : start + 16] for _ in range(args.seeds)]
        generators = [torch.Generator().manual_seed(index % args.seeds) for index in range(len(prompts))]
        images = pipeline(
            prompts,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            width=args.width,
            height=args.height,
            generator=generators,
            output_type="np",
        ).images
        tiles.extend((images * 255).round().astype(np.uint8))
    common.save_grid(args.out, tiles, args.columns)


if __name__ == "__main__":
    main()
