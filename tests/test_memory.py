"""What a worker needs of a GPU is known before it loads anything, and it says so when that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from darkroom.config import BUILTIN_MODEL, load_settings
from darkroom.diffusion.loader import load_model, measure_checkpoint
from darkroom.diffusion.memory import (
    FIXED_ALLOWANCE_BYTES,
    GIB,
    LiveStorages,
    ModelMemory,
    Needed,
    check_memory,
    decode_activation_bytes,
    measure,
    unet_activation_bytes,
)
from darkroom.diffusion.unet import UNet
from darkroom.diffusion.vae import VAE
from darkroom.errors import ConfigError
from darkroom.worker.main import TABLE_ROWS, check_that_models_fit, chosen_vae_dtype, memory_table
from test_readme import table_under

from benchmarks.families import SD15, SD21, SDXL, Family
from tests.support.tiny_models import UNET_CONFIGS, VAE_CONFIG, write_tiny_model

MIB = 1 << 20
SMALL = ModelMemory("small", weights=100 * MIB, text=4 * MIB, row=MIB, unet=50 * MIB, decode=300 * MIB)
LARGE = ModelMemory("large", weights=900 * MIB, text=20 * MIB, row=2 * MIB, unet=200 * MIB, decode=500 * MIB)


def test_the_peak_counts_what_lives_at_the_same_time() -> None:
    with LiveStorages() as storages:
        first = torch.empty(3 * MIB, dtype=torch.uint8, device="meta")
        view = first[: 2 * MIB]
        view.add_(1)
        second = torch.empty(5 * MIB, dtype=torch.uint8, device="meta")
        del first
        third = view + 1
        del view, second
        fourth = torch.empty(4 * MIB, dtype=torch.uint8, device="meta")
    assert storages.peak_bytes == 10 * MIB
    assert third.numel() + fourth.numel() < 10 * MIB


def test_activations_grow_with_rows_and_with_nothing_else() -> None:
    """So one row tells for every bucket; what is not in whole blocks of the allocator is rounded."""
    with torch.device("meta"):
        unet = UNet(UNET_CONFIGS["sdxl"], kernels="torch").fuse()
        vae = VAE(VAE_CONFIG, kernels="torch").fuse()
    assert unet_activation_bytes(unet, 16, 8, 8) == pytest.approx(16 * unet_activation_bytes(unet, 1, 8, 8), rel=0.02)
    assert decode_activation_bytes(vae, 8, 8, 8) == pytest.approx(8 * decode_activation_bytes(vae, 1, 8, 8), rel=0.02)


def test_tiles_bound_the_memory_of_a_decoding() -> None:
    with torch.device("meta"):
        whole, tiled = (VAE(VAE_CONFIG, kernels="torch", tile_px=tile).fuse() for tile in (None, 256))
    assert decode_activation_bytes(tiled, 1, 128, 128) < decode_activation_bytes(whole, 1, 128, 128) / 4


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_weights_are_counted_exactly(family: str, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", family)
    got = measure_checkpoint(directory, dtype=torch.float16, vae_dtype=torch.float32)
    stored = {path.parent.name: path.stat().st_size for path in directory.glob("*/*.safetensors")}
    # The files are fp32 and have a header each.
    halves = sum(size / 2 for name, size in stored.items() if name != "vae")
    assert got.weights == pytest.approx(halves + stored["vae"], rel=0.05)
    model = load_model(directory)
    assert got.text == 77 * model.unet.text_kv_width * 2
    assert got.row == 6 * 4 * 8 * 8 * 4 + 50 * model.unet.time_width * 2
    assert got.name == model.id


def test_models_share_activations_and_not_weights() -> None:
    together, large = Needed.by([SMALL, LARGE], MIB), Needed.by([LARGE], MIB)
    assert together.weights == SMALL.weights + LARGE.weights
    assert together.fixed - large.fixed == SMALL.weights + MIB
    assert together.per_row - large.per_row == 2 * (SMALL.text + SMALL.row)
    assert large.fixed > LARGE.weights + LARGE.decode + FIXED_ALLOWANCE_BYTES


def refusal(models: list[ModelMemory], rows: int, *, budget_bytes: int = 0, free_bytes: int = 200 << 30) -> str | None:
    try:
        check_memory(
            models,
            rows=rows,
            rows_setting="DARKROOM_MAX_ROWS",
            prompt_cache_bytes=256 * MIB,
            budget_bytes=budget_bytes,
            free_bytes=free_bytes,
        )
    except ConfigError as error:
        return str(error)
    return None


def test_a_refusal_names_the_most_rows_that_fit() -> None:
    message = refusal([SMALL, LARGE], 64, budget_bytes=10 << 30)
    assert message is not None
    assert message.startswith("small and large would take about 20.6 GiB of GPU memory with DARKROOM_MAX_ROWS=64")
    assert "10.0 GiB may be used" in message
    most = int(message.split("DARKROOM_MAX_ROWS=")[2].split()[0])
    assert refusal([SMALL, LARGE], most, budget_bytes=10 << 30) is None
    assert refusal([SMALL, LARGE], most + 1, budget_bytes=10 << 30) is not None


def test_a_refusal_says_when_no_number_of_rows_fits() -> None:
    assert "serve fewer models" in str(refusal([SMALL, LARGE], 2, budget_bytes=1 << 30))


def test_a_budget_is_not_more_than_what_is_free() -> None:
    assert refusal([SMALL], 32, budget_bytes=100 << 30, free_bytes=1 << 30)
    assert refusal([SMALL], 32, free_bytes=100 << 30) is None


def test_a_worker_refuses_a_checkpoint_before_it_is_loaded(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", "sd2")
    for file in directory.glob("unet/*.safetensors"):
        file.unlink()
    check_that_models_fit(load_settings(), [directory], 8 << 30)
    with pytest.raises(ConfigError, match=r"model would take about .* GiB of GPU memory with DARKROOM_MAX_ROWS=32"):
        check_that_models_fit(load_settings(), [directory], 1 << 30)
    with pytest.raises(ConfigError, match="DARKROOM_REPRODUCIBLE_ROWS=8"):
        check_that_models_fit(load_settings(batching="reproducible"), [directory, directory], 1 << 30)


@pytest.mark.parametrize(("family", "row"), [(SD15, 0), (SD21, 1), (SDXL, 2)], ids=lambda value: str(value)[:20])
def test_readme_has_the_memory_of_the_families(family: Family, row: int) -> None:
    got = measure(
        family.name,
        family.unet,
        family.vae,
        list(zip(("CLIPTextModel", "CLIPTextModelWithProjection"), family.text, strict=False)),
        [(family.side_px, family.side_px)],
        dtype=torch.float16,
        # As SDXL is published.
        vae_dtype=torch.float32 if family.is_sdxl else torch.float16,
        vae_tile_px=load_settings().vae_tile_px,
    )
    needed = Needed.by([got], load_settings().prompt_cache_bytes)
    cells = [cell.strip() for cell in table_under("GPU memory")[row].strip("|").split("|")]
    assert cells[0] == family.name
    figures = [float(cell) for cell in cells[1:]]
    assert figures == pytest.approx(
        [total / GIB for total in (needed.weights, *map(needed.total, TABLE_ROWS))], abs=0.3
    )


def test_memory_is_listed_by_rows() -> None:
    head, line = memory_table(load_settings(), [BUILTIN_MODEL])
    assert head[0] == "MODEL"
    assert head[-1] == "32 ROWS"
    assert line[0] == "emoji-world"
    figures = [float(cell) for cell in line[1:]]
    assert figures == sorted(figures)


def test_reproducible_pictures_on_a_gpu_are_decoded_in_fp32() -> None:
    """A decode that overflows in fp16 replaces the autoencoder, and pictures after it would have other bits."""
    gpu = torch.device("cuda")
    assert chosen_vae_dtype(load_settings(batching="reproducible"), gpu) is torch.float32
    assert chosen_vae_dtype(load_settings(batching="reproducible", vae_dtype="fp16"), gpu) is torch.float16
    assert chosen_vae_dtype(load_settings(), gpu) is None
