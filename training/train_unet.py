"""Train the denoiser: `python -m training.train_unet --vae VAE_RUN --text TEXT_RUN --out RUN --minutes 65`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from training import common
from training.fastnorm import use_fast_group_norm
from training.painting import Painter
from training.recipes import RECIPES, Recipe
from training.scenes import SceneSet, batches, make_scenes
from training.tokenizer import MAX_TOKENS, tokenize, tokenizer_of
from training.trainer import Trainer

NOISE_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
EMPTY_CAPTION_SHARE = 0.1
# What the denoiser is served with, and what the student learns from.
GUIDANCE_SCALE, NUM_INFERENCE_STEPS = 3.0, 20
# The same picture is told differently from one pass to the next.
CAPTIONS_PER_SCENE = 4
# Of what every recipe's world holds.
PROMPTS = (
    "an astronaut riding a horse", "a duck arguing with a turtle in a forest", "a corgi in a house made of sushi",
    "a dog looking in the mirror seeing a cat", "a dog", "a red circle", "three apples", "a house at night",
    "An astronaut riding a horse in photorealistic style.",
    "A chrome-plated duck with a golden beak arguing with an angry turtle in a forest.",
    "A cute corgi lives in a house made out of sushi.", "A dog looking curiously in the mirror, seeing a cat.",
    "four robots in the city", "two blue hearts", "a cat left of a dog on a beach", "a rocket above a house at night",
    "a penguin in the snow", "a fish under water", "a robot riding a turtle", "a frog in a car",
    "a house made of pizza in the mountains", "a duck looking at an apple", "a penguin in front of a tree in a meadow",
    "a banana right of an apple", "a butterfly", "a car in the desert", "a small frog in a forest",
    "a big mushroom", "a butterfly and a mushroom in a meadow", "a green circle above a purple square",
    "a penguin next to a rocket in the snow", "a fish below a banana on the beach",
)  # fmt: skip


def step_loss(
    unet: nn.Module, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, prompt_embeds: Tensor
) -> Tensor:
    """Mean squared error of v (Salimans and Ho 2022). `latents`, `noise` `[B, C, H, W]`; `timesteps` `[B]` int."""
    signal = alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    spread = (1 - alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
    with common.autocast(latents.device):
        predicted = unet(signal * latents + spread * noise, timesteps, prompt_embeds, return_dict=False)[0]
    return F.mse_loss(predicted.float(), signal * noise - spread * latents)


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL, painter: Painter, scenes: SceneSet, device: torch.device, compiled: bool = False
) -> Tensor:
    """Paint and encode scenes. Returns `[N, C, h, w]` fp16 latents of unit variance, on the device."""

    def encode(pictures: Tensor) -> Tensor:
        mean: Tensor = vae.encode(pictures).latent_dist.mode()
        return mean

    run = torch.compile(encode, dynamic=False) if compiled else encode
    parts = []
    picks = torch.arange(len(scenes), device=device)
    for part in tqdm(list(batches(len(scenes), 256)), desc="encode", mininterval=5):
        pictures = scenes.pictures(painter, picks[part])
        with common.autocast(device):
            # The last, smaller batch is not worth another compilation.
            latents = run(pictures) if len(pictures) == 256 else encode(pictures)
        parts.append((latents.float() * vae.config.scaling_factor).half().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def embed(text_encoder: CLIPTextModel, token_ids: Tensor) -> Tensor:
    """Text states `[B, L, D]` of token ids `[B, L]`."""
    with common.autocast(token_ids.device):
        return text_encoder(token_ids).last_hidden_state


def pick_scenes(alone: Tensor, fraction: float, num_picks: int, generator: torch.Generator) -> Tensor:
    """Return `[num_picks]` scene numbers; `alone` `[N]` bool marks scenes with one object.

    Early in the run (`fraction` near 0) most have one object, which teaches what each word means; late most have more.
    """
    share = max(0.25, 0.85 - 1.2 * fraction)
    singles, others = alone.nonzero()[:, 0], (~alone).nonzero()[:, 0]
    draw = torch.rand(2, num_picks, generator=generator, device=alone.device)
    picks = [kind[(draw[0] * len(kind)).long()] for kind in (singles, others)]
    return torch.where(draw[1] < share, *picks)


def pick_timesteps(num_timesteps: int, fraction: float, num_picks: int, generator: torch.Generator) -> Tensor:
    """Return `[num_picks]` int64 timesteps, more of them noisy, and early in the run most.

    At 16 x 16 latents an object shows through all but the strongest noise, so only there do the words matter.
    """
    power = 1 / (3 - 1.5 * fraction)
    draw = torch.rand(num_picks, generator=generator, device=generator.device)
    return (draw**power * num_timesteps).long().clamp(max=num_timesteps - 1)


@torch.no_grad()
def draw(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    prompts: tuple[str, ...],
    noise_scheduler: SchedulerMixin,
    scale: float,
    seed: int = 0,
) -> np.ndarray:
    """Sample one picture a prompt with classifier-free guidance of `scale` above 1. Returns `[N, H, W, 3]` uint8."""
    device = next(unet.parameters()).device
    texts = [*prompts, *[""] * len(prompts)] if scale > 1 else list(prompts)
    prompt_embeds = embed(text_encoder, tokenize(tokenizer, texts).to(device))
    side, channels = unet.config.sample_size, unet.config.in_channels
    latents = torch.randn(len(prompts), channels, side, side, generator=torch.Generator().manual_seed(seed)).to(device)
    for timestep in noise_scheduler.timesteps:
        with common.autocast(device):
            inputs = latents.repeat(2, 1, 1, 1) if scale > 1 else latents
            predicted = unet(inputs, timestep, prompt_embeds, return_dict=False)[0].float()
        if scale > 1:
            told, untold = predicted.chunk(2)
            predicted = untold + scale * (told - untold)
        latents = noise_scheduler.step(predicted, timestep, latents).prev_sample
    return common.to_pixels(vae.decode(latents / vae.config.scaling_factor).sample)


def teacher_schedule() -> SchedulerMixin:
    noise_scheduler = DPMSolverMultistepScheduler.from_config(NOISE_CONFIG, timestep_spacing="trailing")
    noise_scheduler.set_timesteps(NUM_INFERENCE_STEPS)
    return noise_scheduler


def load_text_encoder(run: Path, device: torch.device) -> CLIPTextModel:
    """The finished text encoder of a `train_text` run, frozen."""
    text_encoder = CLIPTextModel.from_pretrained(run).to(device)
    if device.type == "cpu":
        text_encoder.set_attn_implementation("eager")
    return text_encoder.eval().requires_grad_(False)


def load_vae(run: Path, device: torch.device) -> AutoencoderKL:
    """The finished autoencoder of a `train_vae` run, frozen."""
    vae = AutoencoderKL.from_pretrained(run / "vae").to(device, memory_format=torch.channels_last)
    return vae.eval().requires_grad_(False)


def build_unet(recipe: Recipe, device: torch.device) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_config(recipe.unet).to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        use_fast_group_norm(unet)
        # The fused attention's backward pass is slow at these short lengths.
        unet.set_attn_processor(AttnProcessor())
    return unet


def random_inputs(recipe: Recipe, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and text states of the shapes of a run: what a compiled network is compiled with."""
    channels, side = recipe.unet["in_channels"], recipe.unet["sample_size"]
    return (
        torch.randn(batch_size, channels, side, side, device=device),
        torch.randint(NOISE_CONFIG["num_train_timesteps"], (batch_size,), device=device),
        torch.randn(batch_size, MAX_TOKENS, recipe.text["hidden_size"], device=device),
    )


def parser() -> argparse.ArgumentParser:
    parser = common.run_parser(__doc__, lr=1e-3)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the train_vae run")
    parser.add_argument("--text", type=Path, required=True, help="folder of the train_text run")
    parser.add_argument("--wait", action="store_true", help="get ready, then wait until those runs are finished")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    recipe = RECIPES[args.recipe]
    amount = recipe.amounts["unet"]
    batch_size = args.batch_size or amount.batch
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = tokenizer_of(args.text, recipe.world)
    scenes = make_scenes(recipe.world, args.seed, args.scenes or amount.scenes, CAPTIONS_PER_SCENE, tokenizer)
    scenes = scenes.to(device)
    painter = Painter(device)
    empty_ids = tokenize(tokenizer, [""]).to(device)
    alphas_cumprod = DDIMScheduler.from_config(NOISE_CONFIG).alphas_cumprod.to(device)
    unet = build_unet(recipe, device)
    network = torch.compile(unet, dynamic=False) if args.compile else unet
    if args.compile:
        inputs, timesteps, prompt_embeds = random_inputs(recipe, batch_size, device)
        step_loss(network, inputs, inputs, alphas_cumprod, timesteps, prompt_embeds).backward()
    if args.wait:
        common.wait_for(args.text)
        common.wait_for(args.vae)
    text_encoder, vae = load_text_encoder(args.text, device), load_vae(args.vae, device)
    latents = encode_scenes(vae, painter, scenes, device, args.compile)

    trainer = Trainer(args, unet, weight_decay=0.01, num_scenes=len(scenes), batch_size=batch_size)
    generator, progress = trainer.generator, trainer.progress

    def batch_loss() -> Tensor:
        picks = pick_scenes(scenes.alone, progress.fraction, batch_size, generator)
        tellings = torch.randint(CAPTIONS_PER_SCENE, picks.shape, generator=generator, device=device)
        ids = scenes.token_ids[tellings, picks].long()
        is_untold = torch.rand(batch_size, 1, generator=generator, device=device) < EMPTY_CAPTION_SHARE
        prompt_embeds = embed(text_encoder, torch.where(is_untold, empty_ids, ids))
        clean = latents[picks].float()
        noise = torch.randn(clean.shape, generator=generator, device=device)
        timesteps = pick_timesteps(len(alphas_cumprod), progress.fraction, batch_size, generator)
        return step_loss(network, clean, noise, alphas_cumprod, timesteps, prompt_embeds)

    def show() -> None:
        pixels = draw(unet, text_encoder, vae, tokenizer, PROMPTS, teacher_schedule(), scale=GUIDANCE_SCALE)
        common.save_grid(args.out / "samples" / f"{progress.done_updates:06d}.png", pixels, columns=8, zoom=1)

    trainer.run(batch_loss, show=show)
    trainer.finish()


if __name__ == "__main__":
    main()
