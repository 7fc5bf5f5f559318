"""Our autoencoder computes what diffusers' does, in both directions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from darkroom.config import BUILTIN_MODEL
from darkroom.diffusion.loader import load_model
from darkroom.diffusion.tiles import spread
from darkroom.diffusion.vae import VAE
from darkroom.errors import ModelError
from support.tiny_models import VAE_CONFIG, fresh_seed, tiny_vae
from torch import Tensor

TOLERANCE = 1e-4
VARIANTS: dict[str, dict[str, Any]] = {
    "stable diffusion": {},
    "shifted, without quant convolutions": {
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 16,
    },
    "no attention, four pixels per latent": {
        "mid_block_add_attention": False,
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
    },
}


def pair(name: str, seed: int, *, for_cuda: bool = False, **options: Any) -> tuple[Any, VAE]:
    theirs = tiny_vae(seed, **VARIANTS[name])
    with torch.device("meta"):
        vae = VAE(dict(theirs.config), **options)
    vae.load_state_dict({key: value.clone() for key, value in theirs.state_dict().items()}, assign=True)
    return theirs, vae.fuse(for_cuda=for_cuda)


@pytest.mark.parametrize("for_cuda", [False, True], ids=["cpu", "cuda form"])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_equals_diffusers(name: str, size: tuple[int, int], for_cuda: bool) -> None:
    torch.manual_seed(seed := fresh_seed())
    theirs, vae = pair(name, seed, for_cuda=for_cuda)
    latents = torch.randn(2, vae.config.latent_channels, *size)
    with torch.no_grad():
        expected = theirs.decode(latents / theirs.config.scaling_factor + (theirs.config.shift_factor or 0.0)).sample
    got = vae.decode(latents)
    scale = vae.config.scale_factor
    assert got.shape == (2, 3, scale * size[0], scale * size[1])
    assert (expected.clamp(-1, 1) - got).abs().max() < TOLERANCE
    # Clamping must not be what makes them equal.
    assert (expected.abs() < 1).float().mean() > 0.2


def test_the_kernels_of_cuda_decode_as_diffusers_does() -> None:
    torch.manual_seed(seed := fresh_seed())
    theirs, vae = pair("stable diffusion", seed, for_cuda=True, kernels="triton")
    latents = 0.2 * torch.randn(1, 4, 2, 3)
    with torch.no_grad():
        expected = theirs.decode(latents / theirs.config.scaling_factor).sample
    assert (expected.clamp(-1, 1) - vae.decode(latents)).abs().max() < TOLERANCE


@pytest.mark.parametrize("for_cuda", [False, True], ids=["cpu", "cuda form"])
@pytest.mark.parametrize("name", VARIANTS)
def test_encoding_equals_diffusers_in_the_denoisers_space(name: str, for_cuda: bool) -> None:
    torch.manual_seed(seed := fresh_seed())
    theirs, vae = pair(name, seed, for_cuda=for_cuda)
    pixels = torch.rand(2, 3, 40, 72) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0.0
    mean, std = vae.encode(pixels)
    assert ((posterior.mean - shift) * scale - mean).abs().max() < TOLERANCE * mean.abs().max()
    assert (posterior.std * scale - std).abs().max() < TOLERANCE * std.abs().max()


@pytest.fixture(scope="module")
def trained() -> VAE:
    """The built-in model's, since only a trained one says how a tile looks."""
    return load_model(BUILTIN_MODEL).vae


@pytest.fixture(scope="module")
def scene(trained: VAE) -> Tensor:
    """Latents of 384 × 256 px of bright discs on waves of colour, so that every part looks about like every other."""
    rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(384.0), indexing="ij")
    picture = torch.stack([(rows / 15).sin(), (columns / 17).cos(), ((rows + columns) / 23).sin()])
    picture[:, (rows % 48 - 24) ** 2 + (columns % 48 - 24) ** 2 < 150] = 0.9
    mean, _ = trained.encode(0.8 * picture[None])
    return mean


def test_a_picture_that_is_not_too_large_is_decoded_in_one_piece(trained: VAE, scene: Tensor) -> None:
    whole = trained.decode(scene)
    for tile_px in (384, 4096):
        trained.tile_px = tile_px
        assert torch.equal(trained.decode(scene), whole)
    trained.tile_px = None


def test_tiles_look_like_the_whole_and_show_no_seams(trained: VAE, scene: Tensor) -> None:
    whole = trained.decode(scene)
    trained.tile_px = 160
    tiled = trained.decode(scene)
    trained.tile_px = None
    assert tiled.shape == whole.shape
    psnr_db = 10 * torch.log10(4 / (tiled - whole).square().mean()).item()
    assert psnr_db > 30
    # A seam is a line where a tile begins or ends and the difference to the whole jumps, by 0.1 where nothing fades.
    scale = whole.shape[2] // scene.shape[2]
    for axis in (2, 3):
        steps = (tiled - whole).diff(dim=axis).abs().mean(dim=(0, 1, 5 - axis))
        size, starts = spread(scene.shape[axis], 160 // scale)
        lines = [scale * start - 1 for start in starts[1:]] + [scale * (start + size) - 1 for start in starts[:-1]]
        assert len(lines) >= 2
        assert steps[lines].max() < 4 * steps.median() + 0.005


@pytest.mark.parametrize(("length", "limit"), [(17, 16), (24, 16), (256, 192), (100, 7), (5, 2)])
def test_tiles_are_equal_cover_everything_and_overlap(length: int, limit: int) -> None:
    size, starts = spread(length, limit)
    assert size <= limit
    assert starts[0] == 0
    assert starts[-1] + size == length
    for one, other in pairwise(starts):
        assert one + size >= other + (limit > 3)


def test_decoding_what_was_encoded_keeps_the_size() -> None:
    _, vae = pair("stable diffusion", 0)
    mean, _ = vae.encode(torch.zeros(1, 3, 24, 56))
    assert mean.shape == (1, 4, 3, 7)
    assert vae.decode(mean).shape == (1, 3, 24, 56)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latents_mean", [0.0] * 4),
        ("latents_std", [1.0] * 4),
        ("act_fn", "relu"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("up_block_types", ["UpDecoderBlock2D"] * 3),
        ("scaling_factor", 0),
        ("scaling_factor", "0.18"),
        ("norm_num_groups", 3),
        ("block_out_channels", []),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(key: str, value: object) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=key):
        VAE({**VAE_CONFIG, key: value})
