"""Every layout that diffusers writes loads, and everything else is one clear sentence before memory is taken."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from darkroom.config import BUILTIN_MODEL
from darkroom.diffusion import weights
from darkroom.diffusion.loader import choose_vae_dtype, files_to_fetch, load_model, read_card
from darkroom.diffusion.weights import content_hash, read_header
from darkroom.errors import ConfigError, ModelError
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from support.tiny_models import FAMILIES, Family, fresh_seed, write_tiny_model

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: write_tiny_model(root / family, family, seed=7) for family in FAMILIES}


@pytest.fixture
def checkpoint(originals: dict[Family, Path], tmp_path: Path) -> Path:
    """A private copy of the SD 1.x checkpoint, to be damaged."""
    return Path(shutil.copytree(originals["sd1"], tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(path: Path | str, **options: Any) -> str:
    """The one sentence with which a checkpoint is refused."""
    with pytest.raises(ModelError) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What loads.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["whole", "sharded", "fp16", "sharded fp16"])
def test_every_layout_holds_the_same_network(
    originals: dict[Family, Path], tmp_path: Path, family: Family, layout: str
) -> None:
    half = "fp16" in layout
    directory = write_tiny_model(
        tmp_path / "model",
        family,
        seed=7,
        variant="fp16" if half else None,
        max_shard_size="300KB" if "sharded" in layout else "10GB",
    )
    assert not half or not (directory / UNET_FILE).exists()
    expected, got = load_model(originals[family]), load_model(directory)
    x = torch.randn(1, 4, 4, 4)
    tolerance = 0.05 if half else 1e-6
    pictures = [model.vae.decode(x) for model in (expected, got)]
    assert (pictures[0] - pictures[1]).abs().max() <= tolerance
    texts = [model.text.encode(["a cat"])[0].prompt_embeds for model in (expected, got)]
    assert (texts[0] - texts[1]).abs().max() <= tolerance * texts[0].abs().max()
    kv = [model.unet.text_kv(texts[0][None]) for model in (expected, got)]
    assert (kv[0] - kv[1]).abs().max() <= tolerance * kv[0].abs().max()


def test_a_pipeline_of_ours_equals_one_of_diffusers_end_to_end(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", "sd2", seed=(seed := fresh_seed()))
    model = load_model(directory)
    theirs = StableDiffusionPipeline.from_pretrained(directory, safety_checker=None)
    torch.manual_seed(seed)
    latents, timestep = torch.randn(1, 4, 8, 8), torch.tensor([731.0])
    with torch.no_grad():
        embeds = theirs.encode_prompt("the red cat", "cpu", 1, False)[0]
        expected = theirs.unet(latents, timestep[0], embeds).sample
    got = model.unet(
        latents,
        model.unet.time_projection(timestep),
        model.unet.text_kv(model.text.encode(["the red cat"])[0].prompt_embeds[None]),
    )
    assert (expected - got).abs().max() <= 1e-4 * expected.abs().max()


def test_old_autoencoder_names_load(checkpoint: Path) -> None:
    """SD 1.x autoencoders on the hub still call the attention's matrices query, key, value and proj_attn."""
    x = torch.randn(1, 4, 4, 4)
    expected = load_model(checkpoint).vae.decode(x)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    values = {}
    for name, value in load_file(checkpoint / VAE_FILE).items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        values[name] = value
    save_file(values, checkpoint / VAE_FILE)
    assert torch.equal(load_model(checkpoint).vae.decode(x), expected)


def test_text_encoders_load_with_and_without_the_inner_models_prefix(checkpoint: Path) -> None:
    """Files written before transformers 5 have the prefix, and a stored position_ids."""
    file = checkpoint / "text_encoder" / "model.safetensors"
    expected = load_model(checkpoint).text.encode(["cat"])[0].prompt_embeds
    values = {f"text_model.{name}": value for name, value in load_file(file).items()}
    values["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(values, file)
    assert torch.equal(load_model(checkpoint).text.encode(["cat"])[0].prompt_embeds, expected)


def test_components_that_a_server_does_not_need_are_never_read(checkpoint: Path) -> None:
    edit_json(
        checkpoint / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )
    (checkpoint / "safety_checker").mkdir()
    (checkpoint / "safety_checker" / "pytorch_model.bin").write_bytes(b"not to be opened")
    load_model(checkpoint)


@pytest.mark.parametrize(
    ("family", "sampler", "guidance"), [("sd1", "dpmpp_2m", 7.5), ("sd2", "ddim", 7.5), ("sdxl", "euler", 5.0)]
)
def test_the_card_has_the_familys_habits(
    originals: dict[Family, Path], family: Family, sampler: str, guidance: float
) -> None:
    card = load_model(originals[family]).card
    assert (card.id, card.family, card.sampler, card.guidance_scale) == (family, family, sampler, guidance)
    assert (card.width, card.height, card.vae_scale_factor, card.size_multiple) == (64, 64, 8, 8)
    assert card.sampler in card.samplers
    assert card.sigma_schedule in card.sigma_schedules
    assert 20 <= card.num_inference_steps <= 30
    assert card.max_width >= card.width


def test_darkroom_json_wins_over_habits(checkpoint: Path) -> None:
    own = {
        "id": "mine",
        "num_inference_steps": 8,
        "guidance_scale": 0.0,
        "sampler": "unipc",
        "sigma_schedule": "karras",
    }
    (checkpoint / "darkroom.json").write_text(json.dumps({**own, "width": 72, "height": 40, "license": "CC0-1.0"}))
    card = load_model(checkpoint).card
    assert {name: getattr(card, name) for name in own} == own
    assert (card.width, card.height, card.license) == (72, 40, "CC0-1.0")


@pytest.mark.parametrize(
    "own",
    [
        {"sampler": "dpm_fast"},
        {"width": 63},
        {"num_inference_steps": "8"},
        {"sampler": "ddim", "sigma_schedule": "karras"},
    ],
    ids=str,
)
def test_a_wrong_darkroom_json_is_named(checkpoint: Path, own: dict[str, Any]) -> None:
    (checkpoint / "darkroom.json").write_text(json.dumps(own))
    assert "darkroom.json" in refusal(checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_card_is_read_without_reading_weights(
    originals: dict[Family, Path], family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_model(originals[family]).card
    monkeypatch.setattr(weights, "safe_open", None)
    assert read_card(originals[family]) == expected


def test_a_card_is_refused_where_its_model_would_be(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / UNET_FILE)
    del tensors["conv_in.bias"]
    save_file(tensors, checkpoint / UNET_FILE)
    with pytest.raises(ModelError, match=r"conv_in\.bias is missing"):
        read_card(checkpoint)


def test_only_sdxl_embeds_sizes(originals: dict[Family, Path]) -> None:
    assert load_model(originals["sd1"]).time_ids(64, 72) is None
    ids = load_model(originals["sdxl"]).time_ids(64, 72)
    assert ids is not None
    assert ids.tolist() == [72, 64, 0, 0, 72, 64]


def test_the_hash_follows_the_weights_and_nothing_else(checkpoint: Path) -> None:
    before = load_model(checkpoint).card.weights_hash
    assert len(before) == 12
    (checkpoint / "darkroom.json").write_text(json.dumps({"id": "renamed"}))
    assert load_model(checkpoint).card.weights_hash == before
    values = load_file(checkpoint / UNET_FILE)
    values["conv_in.bias"][0] += 1e-3
    save_file(values, checkpoint / UNET_FILE)
    assert load_model(checkpoint).card.weights_hash != before


def test_large_files_are_hashed_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "big.safetensors"
    save_file({"x": torch.zeros(1 << 20)}, file)
    monkeypatch.setattr("darkroom.diffusion.weights.WHOLE_HASH_BYTES", 1 << 16)
    before = content_hash([file])
    save_file({"x": torch.zeros(1 << 20).index_fill_(0, torch.tensor([(1 << 20) - 1]), 1.0)}, file)
    assert content_hash([file]) != before


def test_loading_keeps_a_log_quiet(
    originals: dict[Family, Path], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(originals["sdxl"]).text.encode(["long " * 200])
    assert caplog.records == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("device", "dtype", "config", "is_sdxl", "expected"),
    [
        ("cuda", torch.float16, {}, False, torch.float16),
        ("cuda", torch.float16, {"force_upcast": True}, False, torch.float16),
        ("cuda", torch.float16, {}, True, torch.float32),
        ("cuda", torch.float16, {"force_upcast": False}, True, torch.float16),
        ("cuda", torch.bfloat16, {}, False, torch.float16),
        ("cuda", torch.float32, {}, False, torch.float32),
        ("cpu", torch.float32, {}, False, torch.float32),
        ("cpu", torch.bfloat16, {}, True, torch.bfloat16),
    ],
    ids=str,
)
def test_an_autoencoder_is_fp16_on_a_gpu_unless_it_is_known_to_overflow(
    device: str, dtype: torch.dtype, config: dict[str, bool], is_sdxl: bool, expected: torch.dtype
) -> None:
    assert choose_vae_dtype(config, torch.device(device), dtype, is_sdxl=is_sdxl) is expected


def test_the_built_in_model_loads() -> None:
    model = load_model(BUILTIN_MODEL)
    levels = json.loads((BUILTIN_MODEL / "vae" / "config.json").read_text())["block_out_channels"]
    assert model.vae_scale_factor == 2 ** (len(levels) - 1)
    assert model.text.encode(["a cat"])[0].prompt_embeds.shape[0] == model.text.max_tokens


# What is refused.


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing")


def test_a_single_file_checkpoint_is_named(tmp_path: Path) -> None:
    file = tmp_path / "sd.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert str(file) in refusal(file)


def test_an_empty_directory_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "model_index.json") in refusal(tmp_path)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(checkpoint: Path, component: str) -> None:
    shutil.rmtree(checkpoint / component)
    assert str(checkpoint / component) in refusal(checkpoint)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_component_that_the_index_does_not_list_is_named(checkpoint: Path, component: str) -> None:
    edit_json(checkpoint / "model_index.json", **{component: [None, None]})
    assert f"component {component} is missing" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "StableDiffusionUpscalePipeline"),
        ({"_class_name": None}, "None"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "UNet3DConditionModel"),
        ({"unet": ["my_unet", "UNet2DConditionModel"]}, "my_unet"),
        ({"unet": ["diffusers"]}, "unet"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet"),
        ({"../../etc": ["diffusers", "UNet2DConditionModel"]}, "etc"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
    ],
    ids=str,
)
def test_what_the_index_may_not_say_is_named(checkpoint: Path, changes: dict[str, Any], named: str) -> None:
    edit_json(checkpoint / "model_index.json", **changes)
    message = refusal(checkpoint)
    assert named in message
    assert "model_index.json" in message


@pytest.mark.parametrize("name", ["unet/config.json", "vae/config.json", "text_encoder/config.json"])
def test_a_repositorys_own_code_is_never_run(checkpoint: Path, name: str) -> None:
    edit_json(checkpoint / name, auto_map={"AutoModel": "evil.Model"})
    assert "auto_map" in refusal(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, "\xff\xfe"], ids=ascii)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_broken_json_file_is_named(checkpoint: Path, name: str, content: str) -> None:
    (checkpoint / name).write_bytes(content.encode("latin-1"))
    assert str(checkpoint / name) in refusal(checkpoint)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("vae/config.json", {"latents_mean": [0.0]}, "latents_mean"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("text_encoder/config.json", {"hidden_size": 33}, "hidden size"),
        ("text_encoder/config.json", {"hidden_act": "evil"}, "evil"),
        ("text_encoder/config.json", {"vocab_size": "many"}, "vocab_size"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_honoured_is_named(
    checkpoint: Path, name: str, changes: dict[str, Any], named: str
) -> None:
    edit_json(checkpoint / name, **changes)
    message = refusal(checkpoint)
    assert str(checkpoint / name) in message
    assert named in message


def test_parts_that_do_not_fit_are_named(originals: dict[Family, Path], tmp_path: Path) -> None:
    seven = write_tiny_model(tmp_path / "seven", "sd1", unet={"in_channels": 7})
    assert "takes 7 channels" in refusal(seven)
    wide = write_tiny_model(tmp_path / "wide", "sd1", unet={"cross_attention_dim": 40})
    assert "40 wide" in refusal(wide)


def test_pickled_weights_are_refused_by_name(checkpoint: Path) -> None:
    (checkpoint / UNET_FILE).rename(checkpoint / "unet" / "diffusion_pytorch_model.bin")
    message = refusal(checkpoint)
    assert str(checkpoint / "unet") in message
    assert "diffusion_pytorch_model.bin" in message
    assert "pickled" in message


@pytest.mark.parametrize("kept", [0, 5, 8, 1000, -1])
def test_a_truncated_file_is_named(checkpoint: Path, kept: int) -> None:
    file = checkpoint / UNET_FILE
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in refusal(checkpoint)


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["conv_in.bias"].update(data_offsets=[0, 1 << 40]),
        lambda header: header["conv_in.bias"].update(data_offsets=[-64, 0]),
        lambda header: header["conv_in.bias"].update(data_offsets=header["conv_out.weight"]["data_offsets"]),
        lambda header: header["conv_in.bias"].update(data_offsets="0,64"),
        lambda header: header["conv_in.bias"].update(shape=[1 << 60, 1 << 60]),
        lambda header: header["conv_in.bias"].update(shape=[1.5]),
        lambda header: header["conv_in.bias"].update(shape=None),
        lambda header: header["conv_in.bias"].update(dtype="F8_E4M3"),
        lambda header: header["conv_in.bias"].pop("dtype"),
        lambda header: header.update({"conv_in.bias": 5}),
    ],
)
def test_a_header_that_lies_is_refused_by_file(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite_header(checkpoint / UNET_FILE, change)
    assert str(checkpoint / UNET_FILE) in refusal(checkpoint)


def test_a_header_larger_than_the_cap_is_never_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 100 * 1000 * 1000 + 1))
        opened.truncate(1 << 30)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_header(file)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_missing_unexpected_or_misshapen_tensor_is_named(checkpoint: Path, component: str) -> None:
    (file,) = (checkpoint / component).glob("*.safetensors")
    values = load_file(file)
    name = sorted(values)[0]
    save_file({key: value for key, value in values.items() if key != name}, file)
    message = refusal(checkpoint)
    assert str(file) in message
    assert f"tensor {name} is missing" in message
    save_file({**values, "surplus": torch.zeros(1)}, file)
    message = refusal(checkpoint)
    assert str(file) in message
    assert "'surplus' is unexpected" in message
    save_file({**values, name: torch.zeros(3, 3)}, file)
    message = refusal(checkpoint)
    assert str(file) in message
    assert f"tensor {name} has shape [3, 3]" in message


def test_whole_numbers_are_no_weights(checkpoint: Path) -> None:
    values = load_file(checkpoint / UNET_FILE)
    save_file({**values, "conv_in.bias": values["conv_in.bias"].to(torch.int8)}, checkpoint / UNET_FILE)
    assert "conv_in.bias is stored as I8" in refusal(checkpoint)


@pytest.mark.parametrize(
    "shard",
    ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "a\\b.safetensors", "x.bin", 5, ".."],
    ids=str,
)
def test_an_index_cannot_lead_out_of_its_directory(checkpoint: Path, shard: object) -> None:
    (checkpoint / UNET_FILE).unlink()
    index = checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.bias": shard}}))
    message = refusal(checkpoint)
    assert str(index) in message
    assert "not the name of a safetensors file" in message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", "sd1", max_shard_size="300KB")
    shard = sorted((directory / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    assert str(shard) in refusal(directory)


def test_a_vocabulary_larger_than_the_encoder_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "tokenizer" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps({**vocabulary, **{f"extra{i}": len(vocabulary) + i for i in range(9)}}))
    (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    assert "tokens" in refusal(checkpoint)


@pytest.mark.parametrize("content", ["{}", "{", '{"a": -1}', '{"a": "b"}'])
def test_a_broken_vocabulary_is_named(checkpoint: Path, content: str) -> None:
    (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    (checkpoint / "tokenizer" / "vocab.json").write_text(content)
    assert str(checkpoint / "tokenizer") in refusal(checkpoint) or "text_encoder" in refusal(checkpoint)


def test_a_device_or_implementation_that_is_not_there_is_a_config_error(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="cuda:99"):
        load_model(checkpoint, device="cuda:99")
    with pytest.raises(ConfigError, match="abacus"):
        load_model(checkpoint, device="abacus")
    with pytest.raises(ConfigError, match="abacus"):
        load_model(checkpoint, attention="abacus")


# What would be fetched.


def test_one_variant_of_the_weights_is_fetched_and_nothing_that_runs() -> None:
    names = [
        "model_index.json",
        "README.md",
        "v1-5.ckpt",
        "v1-5.safetensors",
        "run.py",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
        "safety_checker/model.safetensors",
        "vae/../../evil.json",
    ]
    common = {"model_index.json", "unet/config.json", "tokenizer/merges.txt", "vae/diffusion_pytorch_model.safetensors"}
    assert set(files_to_fetch(names, prefer_fp16=False)) == common | {"unet/diffusion_pytorch_model.safetensors"}
    assert set(files_to_fetch(names, prefer_fp16=True)) == common | {"unet/diffusion_pytorch_model.fp16.safetensors"}


def test_an_attention_of_the_name_is_checked_for_the_device_of_the_model(
    originals: dict[Family, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU beside the chosen processor does not make it available there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="'flash' is unavailable: it needs a CUDA device, not cpu"):
        load_model(originals["sd1"], device="cpu", attention="flash")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_autoencoder_whose_one_head_is_too_wide_for_a_named_attention_takes_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SD 1.5's and SDXL's heads of 512 made DARKROOM_ATTENTION=triton fail in the warm-up."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    directory = write_tiny_model(
        tmp_path / "wide", "sd1", vae={"block_out_channels": (8, 8, 8, 512), "layers_per_block": 1}
    )
    with capture_logs() as lines:
        model = load_model(directory, attention="triton")
    (line,) = (line for line in lines if line["event"] == "vae_attention")
    assert (line["asked"], line["instead"]) == ("triton", "auto")
    assert "head size 512" in line["reason"]
    latents = torch.randn(1, 4, 2, 2)
    assert torch.equal(model.vae.decode(latents), load_model(directory).vae.decode(latents))
    with capture_logs() as lines:
        load_model(write_tiny_model(tmp_path / "narrow", "sd1"), attention="triton")
    assert not [line for line in lines if line["event"] == "vae_attention"]
