"""Training: the noise arithmetic of the student, and a run that is stopped and goes on."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from darkroom.diffusion.loader import read_card
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from tests.support.tiny_models import randomise, write_tiny_model
from training import (
    __main__,
    card,
    common,
    contact_sheet,
    distill,
    drawing,
    export,
    painting,
    train_text,
    train_unet,
    train_vae,
)
from training.distill import STUDENT_STEPS, ddim_step, signal_and_spread, step_times, velocity_between
from training.recipes import RECIPES
from training.tokenizer import build_tokenizer
from training.train_unet import NOISE_CONFIG

SHARES = RECIPES["small"].shares


@pytest.fixture
def sigterm() -> Iterator[None]:
    """A run takes SIGTERM for itself; afterwards it is as it was."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_student_takes_the_steps_of_the_sampler_that_serves_it() -> None:
    noise_scheduler = DDIMScheduler.from_config(NOISE_CONFIG, timestep_spacing="trailing")
    noise_scheduler.set_timesteps(STUDENT_STEPS)
    times = step_times(STUDENT_STEPS)
    assert torch.equal(times[:-1], noise_scheduler.timesteps)
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, STUDENT_STEPS, 4, 2, 2, generator=generator).unbind()
    now, then = (signal_and_spread(noise_scheduler.alphas_cumprod, part) for part in (times[:-1], times[1:]))
    ends = ddim_step(latents, velocity, now, then)
    for index, timestep in enumerate(noise_scheduler.timesteps):
        row = slice(index, index + 1)
        expected = noise_scheduler.step(velocity[row], timestep, latents[row]).prev_sample
        torch.testing.assert_close(ends[row], expected)


def test_the_velocity_between_two_points_leads_from_the_one_to_the_other() -> None:
    alphas_cumprod = DDIMScheduler.from_config(NOISE_CONFIG).alphas_cumprod
    times = step_times(STUDENT_STEPS)
    now, then = (signal_and_spread(alphas_cumprod, part) for part in (times[:-1], times[1:]))
    start, end = torch.randn(2, STUDENT_STEPS, 4, 2, 2, generator=torch.Generator().manual_seed(1)).unbind()
    velocity = velocity_between(start, end, now, then)
    torch.testing.assert_close(ddim_step(start, velocity, now, then), end, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("sigterm")
def test_a_run_goes_on_where_it_was_stopped_and_says_when_it_is_finished(tmp_path: Path) -> None:
    """Here the decoder goes on alone: the latents, which a denoiser may have learned, stay as they are."""
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--scenes", "8", "--batch-size", "1", "--held-out", "1"]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def coded() -> tuple[torch.Tensor, torch.Tensor]:
        vae = train_unet.load_vae(tmp_path, torch.device("cpu"))
        latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        return latents, vae.decode(torch.ones_like(latents)).sample

    train_vae.main([*arguments, "--recipe", "small", "--updates", "1"])
    assert common.is_finished(tmp_path)
    latents, decoded = coded()
    train_vae.main([*arguments, "--recipe", "small", "--updates", "2", "--decoder-only"])
    with (tmp_path / "log.csv").open(newline="") as file:
        assert [row["updates"] for row in csv.DictReader(file)] == ["1", "2"]
    assert json.loads((tmp_path / "progress.json").read_text())["updates"] == 2
    assert (tmp_path / "log.png").exists()
    torch.testing.assert_close(coded()[0], latents)
    assert not torch.allclose(coded()[1], decoded)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' samplers and numpy
@pytest.mark.usefixtures("sigterm")
def test_the_stages_follow_each_other_from_nothing_to_two_models_with_their_cards(tmp_path: Path) -> None:
    """One update each. Only the student's record tells of a student, or the teacher's card would be one's.

    The ids of words are those that the run of the text encoder began with, though the captions have changed since.
    """
    runs = {stage: tmp_path / stage for stage in ("text", "vae", "unet", "student")}
    few = ["--device", "cpu", "--recipe", "small", "--scenes", "16", "--updates", "1", "--batch-size", "2"]
    given = ["--vae", str(runs["vae"]), "--text", str(runs["text"])]
    tokenizer = build_tokenizer(RECIPES["small"].world, num_captions=50)
    tokenizer.save_pretrained(runs["text"] / "tokenizer")
    train_text.main([*few, "--out", str(runs["text"])])
    train_vae.main([*few, "--out", str(runs["vae"]), "--held-out", "32"])
    train_unet.main([*few, *given, "--out", str(runs["unet"])])
    distill.main([*few, *given, "--teacher", str(runs["unet"]), "--out", str(runs["student"])])
    models = tmp_path / "models"
    export.main([*given, "--unet", str(runs["unet"]), "--student", str(runs["student"]), "--recipe", "small",
                 "--out", str(models)])  # fmt: skip
    stages = {path.parent.name: list(json.loads(path.read_text())) for path in models.glob("*/training.json")}
    assert stages == {"emoji-world": ["vae", "text", "unet"], "emoji-world-4step": ["vae", "text", "unet", "student"]}
    teacher, student = (path.read_text() for path in card.write_cards(models, tmp_path))
    assert "| Single object | at least 95 %" in teacher
    assert "Teacher at 25 steps before student at 4" in student
    model = drawing.load(models / "emoji-world-4step", "cpu")
    assert CLIPTokenizer.from_pretrained(models / "emoji-world" / "tokenizer").get_vocab() == tokenizer.get_vocab()
    assert drawing.draw(model, ["a cat"], [0], drawing.Sampling.of(model)).shape == (1, 64, 64, 3)


def test_latents_are_centred_without_changing_what_is_reconstructed() -> None:
    generator = torch.Generator().manual_seed(0)
    vae = randomise(train_vae.build_vae(RECIPES["small"].vae), seed=1).eval()
    images = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        before = train_vae.reconstruct(vae, images)
        train_vae.centre_latents(vae, images)
        latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(train_vae.reconstruct(vae, images), before, atol=1e-4, rtol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert abs(float(latents.std()) - 1) < 1e-3


@pytest.mark.usefixtures("sigterm")
def test_a_run_that_is_told_to_stop_ends_after_its_update_and_saves() -> None:
    progress = common.Progress(minutes=None, updates=1000)
    assert not progress.stopping
    signal.raise_signal(signal.SIGTERM)
    assert progress.stopping
    assert not progress.finished


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stage_takes_the_options_that_it_is_started_with(tmp_path: Path, device: str) -> None:
    """The text encoder once refused `--compile`, which only a GPU's stages are given."""
    parsers = {
        "text": train_text.parser(),
        "vae": train_vae.parser(),
        "unet": train_unet.parser(),
        "student": distill.parser(),
    }
    given = __main__.commands(RECIPES["small"], tmp_path, 16, device, scenes=8)
    assert given.keys() == parsers.keys()
    for stage, words in given.items():
        options = parsers[stage].parse_args(words[3:])
        assert (options.out, options.device, options.scenes) == (tmp_path / stage, device, 8)
        assert getattr(options, "compile", False) is (device == "cuda" and stage != "text")


def stage_of(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_stage_that_fails_ends_those_that_wait_for_it(tmp_path: Path) -> None:
    """A stage that ended between two looks, alone, once passed for finished, and the next one waited forever."""
    waiting = stage_of("import time; time.sleep(100)")
    with tqdm(disable=True) as bar, pytest.raises(SystemExit, match="unet ended unfinished with code 3"):
        __main__.follow({"unet": stage_of("raise SystemExit(3)"), "student": waiting}, SHARES, tmp_path, 1.0, bar)
    assert waiting.returncode == -signal.SIGTERM


def test_stages_that_are_finished_are_followed_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    common.finish(tmp_path / "text")
    process = stage_of("")
    with tqdm(disable=True) as bar:
        __main__.follow({"text": process}, SHARES, tmp_path, 1.0, bar)
    assert process.returncode == 0


def test_a_stage_does_not_wait_for_a_run_that_nobody_is_left_to_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = iter((4711, 1))
    monkeypatch.setattr(common.os, "getppid", lambda: next(parents))
    with pytest.raises(SystemExit, match="nobody is left"):
        common.wait_for(tmp_path)


@pytest.mark.usefixtures("sigterm")
def test_an_optimizer_goes_on_as_if_it_had_never_been_stopped(tmp_path: Path) -> None:
    """A checkpoint keeps no memory layout, and the fused optimizer paired each weight with another one's moments."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8, 4, 3, 3, generator=generator)
    gradients = torch.randn(4, 8, 4, 3, 3, generator=generator)

    def begun() -> tuple[nn.Conv2d, torch.optim.AdamW]:
        module = nn.Conv2d(4, 8, 3, bias=False).to(memory_format=torch.channels_last)
        with torch.no_grad():
            module.weight.copy_(start)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)

    def update(module: nn.Conv2d, optimizer: torch.optim.AdamW, gradient: torch.Tensor) -> None:
        module.weight.grad = gradient.to(memory_format=torch.channels_last)
        optimizer.step()

    progress = common.Progress(minutes=None, updates=4)
    module, optimizer = begun()
    for gradient in gradients[:2]:
        update(module, optimizer, gradient)
    common.save_checkpoint(tmp_path, {"live.weight": module.weight}, optimizer, progress, {"device": "here"})
    resumed, its_optimizer = begun()
    weights = common.load_checkpoint(tmp_path, its_optimizer, progress)
    assert weights is not None
    resumed.load_state_dict(common.with_prefix(weights, "live."))
    for gradient in gradients[2:]:
        update(module, optimizer, gradient)
        update(resumed, its_optimizer, gradient)
    assert torch.equal(module.weight, resumed.weight)


def test_runs_of_another_recipe_are_not_taken_for_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights have other shapes; the export ended in a traceback, after all stages had been passed over."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "progress.json").write_text(json.dumps({"recipe": "small"}))
    monkeypatch.setattr(sys, "argv", ["training", "--recipe", "full", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds a run of the recipe small, not full: give another --out"):
        __main__.main()


def test_what_is_missing_for_training_is_named_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "--out", str(tmp_path), "--minutes", "0"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "--minutes: got 0, expected more than 0" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["training", "--out", str(tmp_path)])
    monkeypatch.setattr(painting, "FONT_PATH", tmp_path / "none.ttf")
    with pytest.raises(SystemExit, match=r"none\.ttf is missing: apt-get install fonts-noto-color-emoji"):
        __main__.main()
    with pytest.raises(SystemExit):
        train_text.main(["--out", str(tmp_path)])
    assert "one of the arguments --minutes --updates is required" in capsys.readouterr().err


def test_a_student_links_to_the_files_that_it_shares_with_its_teacher(tmp_path: Path) -> None:
    teacher, student = (write_tiny_model(tmp_path / name, "sd1", seed=3) for name in ("teacher", "student"))
    before = read_card(student).weights_hash
    export.share(teacher, student)
    shared = {path.relative_to(student).parts[0] for path in student.rglob("*") if path.is_symlink()}
    assert shared == set(export.SHARED)
    assert read_card(student).weights_hash == before


def test_a_row_that_is_being_written_is_not_read_yet(tmp_path: Path) -> None:
    log = common.CsvLog(tmp_path / "log.csv")
    assert log.rows() == []
    log.path.touch()
    assert log.rows() == []
    log.write(updates=1, minutes=0.5, loss=2.0)
    with log.path.open("a") as file:
        file.write("2,1.0")
    assert log.rows() == [{"updates": 1.0, "minutes": 0.5, "loss": 2.0}]


def test_rows_that_no_checkpoint_holds_are_forgotten(tmp_path: Path) -> None:
    log = common.CsvLog(tmp_path / "log.csv")
    log.cut(0)
    for updates in (50, 100, 150):
        log.write(updates=updates, loss=1.0)
    log.cut(120)
    assert [row["updates"] for row in log.rows()] == [50, 100]


def test_a_contact_sheet_is_as_wide_as_its_pictures_and_has_room_for_the_longest_prompt() -> None:
    pictures = [Image.new("RGB", (64, 64), "red") for _ in range(3)]
    wide, high = (contact_sheet.sheet_of(pictures, ["a cat", "a dog", words], 2) for words in ("a", "a cow " * 9))
    assert wide.width == high.width == 2 * 64 + 3 * contact_sheet.GAP_PX
    assert high.height > wide.height
    assert wide.getpixel((contact_sheet.GAP_PX, contact_sheet.GAP_PX)) == (255, 0, 0)
    assert contact_sheet.sheet_of(pictures[:1], ["a cat"], 5).width == 64 + 2 * contact_sheet.GAP_PX
