"""Write the averaged weights as a diffusers folder: `python -m training.export --vae RUN --text RUN --unet RUN`."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from training import common, world
from training.train_unet import NOISE_CONFIG, Denoiser

SERVING = {
    "id": "emoji-world",
    "description": "A small text-to-image model of scenes of emoji, 64 px, made to run on any computer.",
    "license": "Apache-2.0 (weights); the pictures it learned from use Noto Color Emoji, SIL OFL 1.1",
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "sampler": "dpmpp_2m",
    "sigma_schedule": "simple",
    "width": world.IMAGE_PX,
    "height": world.IMAGE_PX,
    "example_prompts": [
        "an astronaut riding a horse at night",
        "a penguin in the snow",
        "a cat left of a dog on a beach",
        "a frog riding a horse in the snow",
        "a rocket above a house at night",
        "a fish above a mushroom under water",
        "a big mushroom in a forest",
        "sushi",
    ],
}

CARD = """\
# emoji-world

A text-conditioned latent diffusion model that draws small scenes of emoji at {side} x {side} pixels. It is the model
that Darkroom ships, so that the engine has real weights to serve on any computer. The folder is in the layout of
diffusers (`StableDiffusionPipeline`), in fp16 safetensors; `darkroom.json` holds the settings it is served with.

## What it knows

- Objects: {objects}.
- Places: {places}.
- Plain backgrounds: {plain}.
- Relations of two objects: left of, right of, above, below, next to, riding. Sizes of one object: small, big.

Prompts are English and short, such as "an astronaut riding a horse at night". Case does not matter.

## Data

Scenes drawn by `training/world.py` from a seed, each with captions made from the scene. The glyphs are those of
[Noto Color Emoji](https://github.com/googlefonts/noto-emoji), Copyright Google, under the SIL Open Font License 1.1.
No other pictures or texts were used.

## Figures

| | autoencoder | text encoder | denoiser |
|---|---|---|---|
| parameters | {vae_parameters:.2f} M | {text_parameters:.2f} M | {unet_parameters:.2f} M |
| updates | {vae_updates} | {text_updates} | {unet_updates} |
| examples per update | {vae_batch} | {text_batch} | {unet_batch} |
| training time, minutes | {vae_minutes:.1f} | {text_minutes:.1f} | {unet_minutes:.1f} |
| device | {vae_device} | {text_device} | {unet_device} |
| result | PSNR {psnr_db:.1f} dB on held-out scenes | loss {text_loss:.2f} (sum of 5 answers) | v loss {loss:.3f} |

{note}

## How to retrain

See `training/README.md`: four commands, a CPU is enough.

## Limits

It knows nothing outside the lists above: other words give one of the known objects or a mixture. Two-object scenes
are less reliable than single objects: pairs of similar colour (sushi and pizza) blend, an object may be drawn twice,
and objects in the colours of their background (a robot in the city, a turtle in a forest) are murky. Fine detail, such
as the faces of small objects, is soft. It was trained at {side} x {side} pixels only: larger sizes work, and repeat
the objects. Guidance scales from 2 to 5 and step counts from 10 to 40 look alike.
"""


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save with the two plain files too, for readers that know no `tokenizer.json`."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def last_row(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))[-1]


def num_parameters_m(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the finished train_vae run")
    parser.add_argument("--text", type=Path, required=True, help="folder of the finished train_text run")
    parser.add_argument("--unet", type=Path, required=True, help="folder of the train_unet run")
    parser.add_argument("--note", default="", help="a sentence for the model card on how these runs came about")
    parser.add_argument("--out", type=Path, default=Path("server/darkroom/models/emoji-world"))
    args = parser.parse_args()

    vae = AutoencoderKL.from_pretrained(args.vae / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(args.unet / "tokenizer")
    model = Denoiser(tokenizer)
    weights = load_file(args.unet / "weights.safetensors")
    model.load_state_dict(common.with_prefix(weights, "ema."))
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=model.text_encoder.half(),
        tokenizer=tokenizer,
        unet=model.unet.half(),
        scheduler=DDIMScheduler.from_config(NOISE_CONFIG, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(args.out, safe_serialization=True)
    save_tokenizer(tokenizer, args.out / "tokenizer")
    (args.out / "darkroom.json").write_text(json.dumps(SERVING, indent=2) + "\n")

    runs = {"vae": args.vae, "text": args.text, "unet": args.unet}
    records = {name: json.loads((folder / "progress.json").read_text()) for name, folder in runs.items()}
    figures = {f"{name}_{key}": value for name, record in records.items() for key, value in record.items()}
    card = CARD.format(
        side=world.IMAGE_PX,
        objects=", ".join(world.OBJECTS),
        places=", ".join(phrases[0] for phrases in world.PLACES.values()),
        plain=", ".join(world.PLAIN),
        vae_parameters=num_parameters_m(vae),
        unet_parameters=num_parameters_m(model.unet),
        text_parameters=num_parameters_m(model.text_encoder),
        psnr_db=float(last_row(args.vae / "log.csv")["psnr_db"]),
        loss=float(last_row(args.unet / "log.csv")["loss"]),
        text_loss=float(last_row(args.text / "log.csv")["loss"]),
        note=args.note,
        **figures,
    )
    (args.out / "README.md").write_text(card)


if __name__ == "__main__":
    main()
