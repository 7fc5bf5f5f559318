"""Train the denoiser: `python -m training.train_unet --vae VAE_RUN/vae --text TEXT_RUN --out RUN --minutes 65`."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from training import common, world
from training.fastnorm import use_fast_group_norm
from training.tokenizer import build_tokenizer
from training.train_text import TEXT_WIDTH, build_text_encoder, tokenize

UNET_CONFIG = {
    "sample_size": world.IMAGE_PX // 4,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 128, 128],
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    # Despite its name, diffusers reads this as the number of heads of each level: heads of 64 here.
    "attention_head_dim": [1, 2, 2],
    "norm_num_groups": 32,
    "use_linear_projection": True,
}
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
# Captions per scene that are made ahead; the same picture is told differently from one pass to the next.
CAPTIONS_PER_SCENE = 4
PROMPTS = (
    "a dog", "a cat", "a horse", "an astronaut", "a duck", "a turtle", "a house", "a tree",
    "sushi", "a rocket", "an apple", "a banana", "a car", "a fish", "a butterfly", "a mushroom",
    "a pizza", "a penguin", "a frog", "a robot",
    "a duck left of a turtle in a forest", "an astronaut riding a horse at night",
    "a cat riding a turtle on a beach", "a robot in the city",
    "a penguin in the snow", "a fish under water", "a rocket above a house at night", "a banana right of an apple",
    "a big mushroom in a forest", "a small car in the desert", "a dog next to a cat on a beach",
    "a frog riding a fish under the sea",
)  # fmt: skip


class Denoiser(nn.Module):
    """The text encoder, taught before by `train_text` and frozen here, and the UNet."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = UNet2DConditionModel.from_config(UNET_CONFIG)

    def forward(self, latents: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
        """Predict v: `latents` `[B, 4, H, W]`, `timesteps` `[B]`, `token_ids` `[B, L]`."""
        with torch.no_grad():
            prompt_embeds = self.text_encoder(token_ids).last_hidden_state
        return self.unet(latents, timesteps, prompt_embeds, return_dict=False)[0]


def step_loss(
    model: Denoiser, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, token_ids: Tensor
) -> Tensor:
    """Mean squared error of v (Salimans and Ho 2022). `latents`, `noise` `[B, 4, H, W]`; `timesteps` `[B]` int."""
    signal = alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    spread = (1 - alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
    with torch.autocast(latents.device.type, torch.bfloat16):
        predicted = model(signal * latents + spread * noise, timesteps, token_ids)
    return F.mse_loss(predicted.float(), signal * noise - spread * latents)


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, seed: int, num_scenes: int, single_share: float, device: torch.device) -> Tensor:
    """Draw and encode scenes. Returns `[N, 4, H/4, W/4]` fp16 latents of unit variance."""
    parts = []
    for start in tqdm(range(0, num_scenes, 64), desc="encode", mininterval=10):
        scenes = [world.scene_at(seed, index, single_share) for index in range(start, min(start + 64, num_scenes))]
        images = common.to_tensor(np.stack([np.asarray(world.render(scene)) for scene in scenes])).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        parts.append((latents.float() * vae.config.scaling_factor).half().cpu().contiguous())
    return torch.cat(parts)


def caption_ids(tokenizer: CLIPTokenizer, seed: int, num_scenes: int, single_share: float) -> Tensor:
    """Return token ids `[CAPTIONS_PER_SCENE, N, L]` int16 of captions of each scene."""
    rows = []
    for telling in range(CAPTIONS_PER_SCENE):
        rng = random.Random(f"captions-{seed}-{telling}")
        captions = [world.caption(world.scene_at(seed, index, single_share), rng) for index in range(num_scenes)]
        rows.append(tokenize(tokenizer, captions).short())
    return torch.stack(rows)


def pick_scenes(single: Tensor, fraction: float, num_picks: int, generator: torch.Generator) -> Tensor:
    """Return `[num_picks]` scene numbers; `single` `[N]` bool marks scenes with one object.

    Early in the run (`fraction` near 0) most have one object, which teaches what each word means; late most have two.
    """
    share = 0.85 - 0.6 * fraction
    weights = torch.where(single, share / single.sum(), (1 - share) / (~single).sum())
    return torch.multinomial(weights, num_picks, replacement=True, generator=generator)


def pick_timesteps(num_timesteps: int, fraction: float, num_picks: int, generator: torch.Generator) -> Tensor:
    """Return `[num_picks]` int64 timesteps, more of them noisy, and early in the run most.

    At 16 x 16 latents an object shows through all but the strongest noise, so only there do the words matter.
    """
    power = 1 / (3 - 1.5 * fraction)
    return (torch.rand(num_picks, generator=generator) ** power * num_timesteps).long().clamp(max=num_timesteps - 1)


@torch.no_grad()
def draw(
    model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, prompts: tuple[str, ...], scale: float, seed: int
) -> np.ndarray:
    """Sample one picture a prompt in 20 steps with classifier-free guidance. Returns `[N, H, W, 3]` uint8."""
    noise_scheduler = DPMSolverMultistepScheduler.from_config(NOISE_CONFIG, timestep_spacing="trailing")
    noise_scheduler.set_timesteps(20)
    device = next(model.parameters()).device
    token_ids = tokenize(tokenizer, [*prompts, *[""] * len(prompts)]).to(device)
    prompt_embeds = model.text_encoder(token_ids).last_hidden_state
    side = UNET_CONFIG["sample_size"]
    latents = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(seed)).to(device)
    for timestep in noise_scheduler.timesteps:
        with torch.autocast(device.type, torch.bfloat16):
            told, untold = model.unet(latents.repeat(2, 1, 1, 1), timestep, prompt_embeds).sample.float().chunk(2)
        latents = noise_scheduler.step(untold + scale * (told - untold), timestep, latents).prev_sample
    return common.to_pixels(vae.decode(latents / vae.config.scaling_factor).sample)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="folder that train_vae wrote")
    parser.add_argument("--text", type=Path, required=True, help="folder that train_text wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an unfinished run in it resumes")
    parser.add_argument("--minutes", type=float, help="length of the run in training time")
    parser.add_argument("--updates", type=int, help="length of the run in updates")
    parser.add_argument("--scenes", type=int, default=30_000, help="scenes drawn and encoded once")
    parser.add_argument("--single-share", type=float, default=0.5, help="share of scenes with one object")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report-every", type=int, default=50, help="updates between log rows")
    parser.add_argument("--save-every", type=int, default=300, help="updates between checkpoints and sample grids")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)

    vae = AutoencoderKL.from_pretrained(args.vae).to(device).eval().requires_grad_(False)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.out / "tokenizer")
    latents_path = args.out / "latents.safetensors"
    if not latents_path.exists():
        encoded = encode_scenes(vae, args.seed, args.scenes, args.single_share, device)
        save_file({"latents": encoded}, latents_path)
    latents = load_file(latents_path)["latents"]
    token_ids = caption_ids(tokenizer, args.seed, len(latents), args.single_share)
    empty_ids = tokenize(tokenizer, [""])
    single = torch.tensor(
        [len(world.scene_at(args.seed, index, args.single_share).objects) == 1 for index in range(len(latents))]
    )

    model = Denoiser(tokenizer)
    model.text_encoder.load_state_dict(CLIPTextModel.from_pretrained(args.text).state_dict())
    model.text_encoder.requires_grad_(False)
    model.to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        use_fast_group_norm(model)
        # The fused attention's backward pass is slow at these short lengths.
        model.unet.set_attn_processor(AttnProcessor())
        model.text_encoder.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    progress = common.Progress(args.minutes, args.updates)
    weights = common.load_checkpoint(args.out, optimizer, progress)
    ema = common.Ema(model, args.ema)
    if weights:
        model.load_state_dict(common.with_prefix(weights, "live."))
        ema.restore(common.with_prefix(weights, "ema."))
    alphas_cumprod = DDIMScheduler.from_config(NOISE_CONFIG).alphas_cumprod.to(device)
    log = common.CsvLog(args.out / "log.csv")

    def save() -> None:
        tensors = {f"live.{name}": p for name, p in model.named_parameters()}
        tensors |= {f"ema.{name}": p for name, p in ema.shadow.items()}
        common.save_checkpoint(args.out, tensors, optimizer, progress, args.batch_size, common.device_name(device))
        ema.swap()
        pixels = draw(model, vae, tokenizer, PROMPTS, scale=3.0, seed=0)
        ema.swap()
        common.save_grid(args.out / "samples" / f"{progress.done_updates:06d}.png", pixels, columns=8)

    generator = torch.Generator().manual_seed(args.seed + progress.done_updates)
    running: list[Tensor] = []
    bar = tqdm(total=args.updates, initial=progress.done_updates, desc="unet", mininterval=10)
    while not progress.finished:
        common.follow_cpu_share()
        rate = common.learning_rate(progress, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        size = (args.batch_size,)
        picks = pick_scenes(single, progress.fraction, args.batch_size, generator)
        ids = token_ids[torch.randint(len(token_ids), size, generator=generator), picks].long()
        ids = torch.where(torch.rand(args.batch_size, 1, generator=generator) < EMPTY_CAPTION_SHARE, empty_ids, ids)
        clean = latents[picks].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        timesteps = pick_timesteps(len(alphas_cumprod), progress.fraction, args.batch_size, generator).to(device)
        loss = step_loss(model, clean, noise, alphas_cumprod, timesteps, ids.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
        optimizer.step()
        progress.done_updates += 1
        ema.update(progress.done_updates)
        running.append(loss.detach())
        bar.update()
        if progress.done_updates % args.report_every == 0:
            mean = float(torch.stack(running).mean())
            running.clear()
            log.write(updates=progress.done_updates, minutes=round(progress.elapsed_minutes, 2), loss=mean, lr=rate)
            bar.set_postfix(loss=f"{mean:.4f}")
        if progress.done_updates % args.save_every == 0 or progress.finished:
            save()
    bar.close()


if __name__ == "__main__":
    main()
