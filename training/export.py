"""Write the averaged weights as diffusers folders: `python -m training.export --vae V --text T --unet U --student S`.

The student's folder has a UNet of its own and links to the teacher's other files, so that they are stored once.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from training import common
from training.distill import STUDENT_STEPS
from training.recipes import RECIPES, Recipe, add_recipe
from training.train_unet import GUIDANCE_SCALE, NOISE_CONFIG, NUM_INFERENCE_STEPS

LICENSE = "Apache-2.0 (weights); the pictures it learned from use Noto Color Emoji, SIL OFL 1.1"
EXAMPLES = [
    "an astronaut riding a horse",
    "a duck arguing with a turtle in a forest",
    "a corgi in a house made of sushi",
    "a dog looking in the mirror seeing a cat",
    "a penguin in the snow",
    "three apples",
    "a rocket above a house at night",
    "a robot riding a turtle in the mountains",
    "a red heart left of a blue circle",
]
TEACHER: dict[str, Any] = {
    "id": "emoji-world",
    "description": "A small text-to-image model of scenes of emoji, made to run on any computer.",
    "license": LICENSE,
    "num_inference_steps": NUM_INFERENCE_STEPS,
    "guidance_scale": GUIDANCE_SCALE,
    "sampler": "dpmpp_2m",
    "sigma_schedule": "simple",
    "example_prompts": EXAMPLES,
}
STUDENT: dict[str, Any] = TEACHER | {
    "id": "emoji-world-4step",
    "description": f"emoji-world distilled to {STUDENT_STEPS} steps without guidance.",
    "num_inference_steps": STUDENT_STEPS,
    "guidance_scale": 1.0,
    "sampler": "ddim",
}
SHARED = ("vae", "text_encoder", "tokenizer")


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save with the two plain files too, for readers that know no `tokenizer.json`."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def averaged_unet(recipe: Recipe, run: Path) -> UNet2DConditionModel:
    """The UNet of a run of `train_unet` or `distill`, with its averaged weights."""
    unet = UNet2DConditionModel.from_config(recipe.unet)
    unet.load_state_dict(common.with_prefix(load_file(run / "weights.safetensors"), "ema."))
    return unet


def export(
    recipe: Recipe,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    serving: dict[str, Any],
    out: Path,
) -> None:
    """Write one diffusers folder in fp16, with the settings that Darkroom serves it with."""
    shutil.rmtree(out, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=DDIMScheduler.from_config(NOISE_CONFIG, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    save_tokenizer(tokenizer, out / "tokenizer")
    side = {"width": recipe.world.image_px, "height": recipe.world.image_px}
    (out / "darkroom.json").write_text(json.dumps(serving | side, indent=2) + "\n")
    for path in out.rglob("*.safetensors"):
        # safetensors lets nobody else read what it writes, and an image's user is somebody else.
        path.chmod(0o644)


def share(teacher_folder: Path, student_folder: Path) -> None:
    """Put links to the teacher's files in the place of equal ones of the student.

    Links to files, since a wheel takes in what such a link points to, and leaves out a folder that is a link.
    """
    for part in SHARED:
        for path in (student_folder / part).iterdir():
            path.unlink()
            path.symlink_to(Path("..", "..", teacher_folder.name, part, path.name))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_recipe(parser)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the finished train_vae run")
    parser.add_argument("--text", type=Path, required=True, help="folder of the finished train_text run")
    parser.add_argument("--unet", type=Path, required=True, help="folder of the train_unet run")
    parser.add_argument("--student", type=Path, help="folder of the distill run")
    parser.add_argument("--out", type=Path, default=Path("server/darkroom/models"), help="holds the models' folders")
    args = parser.parse_args(arguments)

    vae = AutoencoderKL.from_pretrained(args.vae / "vae")
    text_encoder = CLIPTextModel.from_pretrained(args.text)
    tokenizer = CLIPTokenizer.from_pretrained(args.text / "tokenizer")
    teacher_folder, student_folder = (args.out / serving["id"] for serving in (TEACHER, STUDENT))
    recipe = RECIPES[args.recipe]
    unet = averaged_unet(recipe, args.unet)
    export(recipe, vae, text_encoder, tokenizer, unet, TEACHER, teacher_folder)
    runs = {"vae": args.vae, "text": args.text, "unet": args.unet}
    networks = {"vae": vae, "text": text_encoder, "unet": unet}
    record = {name: {"parameters": num_parameters(networks[name]), **run_record(run)} for name, run in runs.items()}
    write_record(teacher_folder, record)
    if args.student:
        student = averaged_unet(recipe, args.student)
        export(recipe, vae, text_encoder, tokenizer, student, STUDENT, student_folder)
        share(teacher_folder, student_folder)
        record["student"] = {"parameters": num_parameters(student), **run_record(args.student)}
        write_record(student_folder, record)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """What the card tells of the run: the student's alone has a stage of that name."""
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def num_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def run_record(folder: Path) -> dict[str, Any]:
    """How a run went: its updates and minutes, its recipe, and the last row of its log."""
    record: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    return common.CsvLog(folder / "log.csv").rows()[-1] | record


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
