"""Distil the few-step student: `python -m training.distill --vae VAE --text TEXT --teacher UNET --out RUN --minutes 2`.

Progressive distillation (Salimans and Ho 2022) in one stage, with guidance distilled too (Meng et al. 2023): one step
of the student, without guidance, learns where several DDIM steps of the guided teacher end.
"""

from __future__ import annotations

import argparse
import itertools
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from training import common
from training.painting import Painter
from training.recipes import RECIPES
from training.scenes import make_scenes
from training.tokenizer import tokenize, tokenizer_of
from training.train_unet import (
    CAPTIONS_PER_SCENE,
    GUIDANCE_SCALE,
    NOISE_CONFIG,
    PROMPTS,
    build_unet,
    draw,
    embed,
    encode_scenes,
    load_text_encoder,
    load_vae,
    random_inputs,
)
from training.trainer import Trainer

STUDENT_STEPS = 4
# Lessons that are repeated, where a recipe repeats them.
NUM_KEPT = 100


@dataclass(frozen=True)
class Lesson:
    """A batch of latents `[B, C, H, W]` at timesteps `[B]` with text states `[B, L, D]`, and the v that the student is
    to predict for them."""

    noisy: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor
    velocity: Tensor


def step_times(num_steps: int, num_timesteps: int = 1000) -> Tensor:
    """Timesteps of `num_steps` evenly spaced ("trailing") DDIM steps, and where the last one ends, `[num_steps + 1]`.

    -1 stands for the clean picture, whose signal is taken as the first timestep's: `set_alpha_to_one` is false.
    """
    return torch.arange(num_timesteps, -1, -num_timesteps // num_steps) - 1


def signal_and_spread(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of picture and noise at `timesteps` `[B]`, each `[B, 1, 1, 1]`."""
    kept = alphas_cumprod[timesteps.clamp(min=0)][:, None, None, None]
    return kept.sqrt(), (1 - kept).sqrt()


def ddim_step(latents: Tensor, velocity: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> Tensor:
    """Move `latents` `[B, C, H, W]` from the noise level `now` to `then` along the predicted v."""
    clean = now[0] * latents - now[1] * velocity
    noise = now[1] * latents + now[0] * velocity
    return then[0] * clean + then[1] * noise


def velocity_between(latents: Tensor, end: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> Tensor:
    """The v with which one DDIM step from `now` to `then` takes `latents` to `end`."""
    ratio = then[1] / now[1]
    clean = (end - ratio * latents) / (then[0] - ratio * now[0])
    return (now[0] * latents - clean) / now[1]


@torch.no_grad()
def teacher_end(
    teacher: nn.Module,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    empty_embeds: Tensor,
    alphas_cumprod: Tensor,
    stride: int,
    substeps: int,
    scale: float,
) -> Tensor:
    """Where `substeps` guided DDIM steps lead from `timesteps` `[B]` to `timesteps - stride`."""
    both = torch.cat([prompt_embeds, empty_embeds.expand(len(latents), -1, -1)])
    bounds = [timesteps - round(stride * index / substeps) for index in range(substeps + 1)]
    for start, end in itertools.pairwise(bounds):
        with common.autocast(latents.device):
            told, untold = (
                teacher(latents.repeat(2, 1, 1, 1), start.repeat(2), both, return_dict=False)[0].float().chunk(2)
            )
        now, then = signal_and_spread(alphas_cumprod, start), signal_and_spread(alphas_cumprod, end)
        latents = ddim_step(latents, untold + scale * (told - untold), now, then)
    return latents


def parser() -> argparse.ArgumentParser:
    parser = common.run_parser(__doc__.splitlines()[0], lr=3e-4, seed=1)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the train_vae run")
    parser.add_argument("--text", type=Path, required=True, help="folder of the train_text run")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the train_unet run")
    parser.add_argument("--wait", action="store_true", help="get ready, then wait until those runs are finished")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE, help="of the teacher")
    parser.add_argument(
        "--substeps", type=int, help="of the teacher for one step of the student; default: the recipe's"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    recipe = RECIPES[args.recipe]
    amount = recipe.amounts["student"]
    batch_size = args.batch_size or amount.batch
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = tokenizer_of(args.text, recipe.world)
    scenes = make_scenes(recipe.world, args.seed, args.scenes or amount.scenes, CAPTIONS_PER_SCENE, tokenizer)
    scenes = scenes.to(device)
    painter = Painter(device)
    noise_scheduler = DDIMScheduler.from_config(NOISE_CONFIG, timestep_spacing="trailing")
    noise_scheduler.set_timesteps(STUDENT_STEPS)
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(device)
    times = step_times(STUDENT_STEPS).to(device)
    stride = int(times[0] - times[1])
    teacher, student = build_unet(recipe, device), build_unet(recipe, device)
    teacher.eval().requires_grad_(False)
    teach, learn = teacher, student
    if args.compile:
        # The teacher's batches are twice as large; that must not make sizes vary for both.
        teach, learn = (torch.compile(unet, dynamic=False) for unet in (teacher, student))

    def lesson(noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, empty_embeds: Tensor) -> Lesson:
        end = teacher_end(
            teach,
            noisy,
            timesteps,
            prompt_embeds,
            empty_embeds,
            alphas_cumprod,
            stride,
            args.substeps or recipe.substeps,
            args.guidance_scale,
        )
        now = signal_and_spread(alphas_cumprod, timesteps)
        then = signal_and_spread(alphas_cumprod, timesteps - stride)
        return Lesson(noisy, timesteps, prompt_embeds, velocity_between(noisy, end, now, then))

    def lesson_loss(given: Lesson) -> Tensor:
        with common.autocast(device):
            predicted = learn(given.noisy, given.timesteps, given.prompt_embeds, return_dict=False)[0]
        return F.mse_loss(predicted.float(), given.velocity)

    if args.compile:
        noisy, timesteps, prompt_embeds = random_inputs(recipe, batch_size, device)
        lesson_loss(lesson(noisy, times[timesteps % STUDENT_STEPS], prompt_embeds, prompt_embeds[:1])).backward()
    if args.wait:
        for run in (args.text, args.vae, args.teacher):
            common.wait_for(run)
    text_encoder, vae = load_text_encoder(args.text, device), load_vae(args.vae, device)
    latents = encode_scenes(vae, painter, scenes, device, args.compile)
    empty_embeds = embed(text_encoder, tokenize(tokenizer, [""]).to(device))

    taught = common.with_prefix(load_file(args.teacher / "weights.safetensors"), "ema.")
    teacher.load_state_dict(taught)
    student.load_state_dict(taught)
    trainer = Trainer(args, student, weight_decay=0.0, num_scenes=len(scenes), batch_size=batch_size)
    generator = trainer.generator
    kept: deque[Lesson] = deque(maxlen=NUM_KEPT if recipe.repeats > 1 else 1)

    def batch_loss() -> Tensor:
        if kept and trainer.progress.done_updates % recipe.repeats:
            return lesson_loss(kept[int(torch.randint(len(kept), (), generator=generator, device=device))])
        size = (batch_size,)
        picks = torch.randint(len(scenes), size, generator=generator, device=device)
        tellings = torch.randint(CAPTIONS_PER_SCENE, size, generator=generator, device=device)
        prompt_embeds = embed(text_encoder, scenes.token_ids[tellings, picks].long())
        clean = latents[picks].float()
        noise = torch.randn(clean.shape, generator=generator, device=device)
        timesteps = times[torch.randint(STUDENT_STEPS, size, generator=generator, device=device)]
        signal, spread = signal_and_spread(alphas_cumprod, timesteps)
        kept.append(lesson(signal * clean + spread * noise, timesteps, prompt_embeds, empty_embeds))
        return lesson_loss(kept[-1])

    def show() -> None:
        pixels = draw(student, text_encoder, vae, tokenizer, PROMPTS, noise_scheduler, scale=1.0)
        name = f"{trainer.progress.done_updates:06d}.png"
        common.save_grid(args.out / "samples" / name, pixels, columns=8, zoom=1)

    trainer.run(batch_loss, show=show)
    trainer.finish()


if __name__ == "__main__":
    main()
