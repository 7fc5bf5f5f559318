"""Train the autoencoder on drawn scenes: `python -m training.train_vae --out RUN --minutes 22`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from training import common
from training.fastnorm import use_fast_group_norm
from training.painting import Painter
from training.recipes import RECIPES
from training.scenes import batches, make_scenes
from training.trainer import Trainer
from training.world import World

KL_WEIGHT = 1e-6
GRADIENT_WEIGHT = 0.5
SQUARED_WEIGHT = 3.0
HELD_OUT_SEED = 1_000_003


def build_vae(config: dict[str, Any]) -> AutoencoderKL:
    vae = AutoencoderKL.from_config(config)
    # Start nearly without sampling noise: at unit noise the decoder learns to ignore the latents and stays there.
    with torch.no_grad():
        vae.quant_conv.weight[config["latent_channels"] :] = 0
        vae.quant_conv.bias[config["latent_channels"] :] = -7
    return vae


def reconstruction_loss(output: Tensor, target: Tensor, sharpness: float) -> Tensor:
    """Squared error, and `sharpness` times L1 and L1 of the neighbour differences. Both `[B, 3, H, W]`.

    They keep edges sharp, and lead there faster; squared error alone comes closest in the end.
    """
    absolute = F.l1_loss(output, target)
    for dim in (2, 3):
        absolute = absolute + GRADIENT_WEIGHT * F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return SQUARED_WEIGHT * F.mse_loss(output, target) + sharpness * absolute


def sharpness_at(fraction: float) -> float:
    """1, and in the last fifth of a run less and less."""
    return min(1.0, 5 * (1 - fraction))


def step_loss(
    forward: Callable[[AutoencoderKL, Tensor], Any], vae: AutoencoderKL, images: Tensor, sharpness: float
) -> Tensor:
    """Loss of one batch, `[B, 3, H, W]` in [-1, 1]. `forward` is `_forward`, maybe compiled."""
    with common.autocast(images.device):
        output, mean, log_variance = forward(vae, images)
    mean, log_variance = mean.float(), log_variance.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
    return reconstruction_loss(output.float(), images, sharpness) + KL_WEIGHT * kl


def _forward(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction, and mean and log variance of the posterior."""
    posterior = vae.encode(images).latent_dist
    return vae.decode(posterior.sample()).sample, posterior.mean, posterior.logvar


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode to the posterior's mean and decode, `[B, 3, H, W]`."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.float() for part in images.split(64)])


def psnr_db(output: Tensor, target: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, for values in [-1, 1]."""
    error = (output.clamp(-1, 1) - target).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def centre_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Have each channel of the latents of `images` be around 0, and set the scale at which all have variance 1.

    The 1 x 1 convolutions on either side of the latents take the mean away and put it back: reconstructions stay as
    they are, and a denoiser does not have to learn it.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    std = float((latents - mean[:, None, None]).std())
    vae.register_to_config(scaling_factor=round(1 / std, 5))


def held_out_pictures(world: World, painter: Painter, num: int) -> Tensor:
    """Scenes that no training run draws, `[N, 3, H, W]` in [-1, 1]."""
    scenes = make_scenes(world, HELD_OUT_SEED, num)
    return torch.cat([scenes.pictures(painter, torch.arange(num)[part]) for part in batches(num, 64)])


def parser() -> argparse.ArgumentParser:
    parser = common.run_parser(__doc__, lr=1.5e-3)
    parser.add_argument("--held-out", type=int, default=64, help="scenes that the quality is measured on")
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="go on without changing the latents that a denoiser learns",
    )
    parser.set_defaults(report_every=200)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    recipe = RECIPES[args.recipe]
    amount = recipe.amounts["vae"]
    batch_size = args.batch_size or amount.batch
    args.out.mkdir(parents=True, exist_ok=True)

    painter = Painter(device)
    scenes = make_scenes(recipe.world, args.seed, args.scenes or amount.scenes).to(device)
    held_out = held_out_pictures(recipe.world, painter, args.held_out)
    vae = build_vae(recipe.vae).to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        use_fast_group_norm(vae)
    forward = torch.compile(_forward, dynamic=False) if args.compile else _forward
    trainer = Trainer(args, vae, weight_decay=1e-4, num_scenes=len(scenes), batch_size=batch_size)
    if args.decoder_only:
        trainer.take_averages()
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)

    def batch_loss() -> Tensor:
        picks = torch.randint(len(scenes), (batch_size,), generator=trainer.generator, device=device)
        return step_loss(forward, vae, scenes.pictures(painter, picks), sharpness_at(trainer.progress.fraction))

    def measure() -> dict[str, float]:
        output = reconstruct(vae, held_out)
        pairs = torch.stack([held_out[:32], output[:32]], dim=1).flatten(0, 1)
        common.save_grid(args.out / "reconstructions.png", common.to_pixels(pairs), columns=16, zoom=1)
        return {"psnr_db": psnr_db(output, held_out)}

    trainer.run(batch_loss, measure=measure)
    with trainer.averaged():
        picks = torch.arange(min(1024, len(scenes)), device=device)
        pictures = torch.cat([scenes.pictures(painter, picks[part]) for part in batches(len(picks), 64)])
        centre_latents(vae, pictures)
        vae.save_pretrained(args.out / "vae")
    trainer.finish()


if __name__ == "__main__":
    main()
