"""Our UNet computes what diffusers' does, at any size, and rows of one batch know nothing of each other."""

from __future__ import annotations

from typing import Any

import darkroom_kernels
import pytest
import torch
from darkroom.diffusion.unet import UNet, UNetConfig
from darkroom.errors import ModelError
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from support.tiny_models import FAMILIES, POOLED_WIDTH, UNET_CONFIGS, Family, fresh_seed, tiny_unet
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

TOLERANCE = 1e-4
TIME_IDS = torch.tensor([64.0, 72.0, 0.0, 0.0, 64.0, 72.0])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours(
    theirs: UNet2DConditionModel, dtype: torch.dtype = torch.float32, *, for_cuda: bool = False, **options: Any
) -> UNet:
    """Our network with the oracle's weights, in a CPU's form or in CUDA's."""
    with torch.device("meta"):
        unet = UNet(dict(theirs.config), **options)
    values = {name: value.to(dtype, copy=True) for name, value in theirs.state_dict().items()}
    unet.load_state_dict(values, assign=True)
    return unet.fuse(for_cuda=for_cuda)


def difference(expected: Tensor, got: Tensor) -> float:
    return ((expected - got.float()).abs().max() / expected.abs().max()).item()


class Inputs:
    """Random inputs of a batch, in both networks' terms."""

    def __init__(self, theirs: UNet2DConditionModel, batch: int, height: int, width: int, length: int = 7):
        config = theirs.config
        self.latents = torch.randn(batch, config.in_channels, height, width)
        self.timesteps = torch.rand(batch) * 999
        self.text = torch.randn(batch, length, config.cross_attention_dim)
        self.pooled = torch.randn(batch, POOLED_WIDTH) if config.addition_embed_type else None

    def oracle(self, theirs: UNet2DConditionModel, row: int, length: int | None = None, **extra: Any) -> Tensor:
        """diffusers, run for one row alone."""
        if self.pooled is not None:
            extra["added_cond_kwargs"] = {"text_embeds": self.pooled[row : row + 1], "time_ids": TIME_IDS[None]}
        with torch.no_grad():
            return theirs(
                self.latents[row : row + 1], self.timesteps[row], self.text[row : row + 1, :length], **extra
            ).sample

    def time(self, unet: UNet, **extra: Any) -> Tensor:
        """One line of time projection per row, each computed as its request would."""
        lines = []
        for row, timestep in enumerate(self.timesteps):
            if self.pooled is not None:
                extra |= {"pooled_prompt_embeds": self.pooled[row], "time_ids": TIME_IDS}
            lines.append(unet.time_projection(timestep[None], **extra))
        return torch.cat(lines)

    def run(self, unet: UNet, lengths: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        return unet(self.latents, self.time(unet), unet.text_kv(self.text), lengths, slots)


@pytest.mark.parametrize("size", [(8, 8), (9, 5), (7, 16)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_equals_diffusers_run_alone_at_its_own_timestep(family: Family, size: tuple[int, int]) -> None:
    torch.manual_seed(seed := fresh_seed())
    theirs = tiny_unet(family, seed)
    inputs = Inputs(theirs, 3, *size)
    got = inputs.run(ours(theirs))
    assert got.shape == inputs.latents.shape
    for row in range(3):
        assert difference(inputs.oracle(theirs, row), got[row : row + 1]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_latent_pixel_works(family: Family) -> None:
    """A loose bound: a norm over two values turns rounding into a visible difference, in diffusers as here."""
    theirs = tiny_unet(family, 5)
    torch.manual_seed(5)
    inputs = Inputs(theirs, 1, 1, 1)
    assert difference(inputs.oracle(theirs, 0), inputs.run(ours(theirs))) < 0.01


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_of_cuda_equals_diffusers_too(family: Family, kernels: str) -> None:
    """Where biases ride on other operations and products are added in place, with the kernels' interpreter as well."""
    torch.manual_seed(seed := fresh_seed())
    theirs = tiny_unet(family, seed, **({"layers_per_block": 1} if kernels == "triton" else {}))
    inputs = Inputs(theirs, 2, 6, 4)
    unet = ours(theirs, for_cuda=True, kernels=kernels)
    before = [tensor.clone() for tensor in (inputs.latents, inputs.text)]
    got = inputs.run(unet)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for row in range(2):
        assert difference(inputs.oracle(theirs, row), got[row : row + 1]) < TOLERANCE
    assert torch.equal(inputs.run(unet), got), "a second call starts from what the first one left"
    assert all(map(torch.equal, before, (inputs.latents, inputs.text)))


@pytest.mark.parametrize("for_cuda", [False, True], ids=["cpu", "cuda form"])
def test_rows_read_their_texts_from_a_store_by_slot(for_cuda: bool) -> None:
    torch.manual_seed(seed := fresh_seed())
    theirs = tiny_unet("sdxl", seed)
    inputs = Inputs(theirs, 3, 4, 6, length=9)
    unet = ours(theirs, for_cuda=for_cuda)
    store = unet.text_kv(torch.cat([torch.full((1, 9, inputs.text.shape[2]), torch.nan), inputs.text.flip(0)]))
    lengths = torch.tensor([9, 9, 4], dtype=torch.int32)
    slots = torch.tensor([3, 3, 1])
    got = unet(inputs.latents, inputs.time(unet), store, lengths, slots)
    for row, (length, text) in enumerate(((9, 0), (9, 0), (4, 2))):
        alone = Inputs.__new__(Inputs)
        alone.__dict__ = {**vars(inputs), "text": inputs.text[[text] * 3]}
        assert difference(alone.oracle(theirs, row, length), got[row : row + 1]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "side", "teraflops"), [("Stable Diffusion 1.5", 64, 0.803), ("SDXL", 128, 6.761)], ids=str
)
def test_the_work_of_a_forward_is_counted_without_a_device(name: str, side: int, teraflops: float) -> None:
    """Within 1 %: the count of diffusers' classes has the keys and values of the text, here made once per request."""
    with torch.device("meta"):
        unet = UNet(PUBLISHED[name][1], kernels="torch").to(torch.float16).fuse()
        x, time = torch.empty(1, 4, side, side), torch.empty(1, unet.time_width, dtype=torch.float16)
        text = torch.empty(1, 77, unet.text_kv_width, dtype=torch.float16)
        with FlopCounterMode(display=False) as counter:
            unet(x, time, text)
    assert counter.get_total_flops() == pytest.approx(teraflops * 1e12, rel=0.01)


VARIANTS: dict[str, dict[str, Any]] = {
    "nine input channels": {"in_channels": 9},
    "centred input": {"center_input_sample": True},
    "only cross-attention": {"only_cross_attention": [True, False, False]},
    "plain middle": {"mid_block_type": "UNetMidBlock2D"},
    "no middle": {"mid_block_type": None},
    "layers per block differ": {"layers_per_block": [1, 2, 1]},
    "deep transformers": {"transformer_layers_per_block": [1, 2, 1]},
    "transformers per residual block": {
        "transformer_layers_per_block": [[2, 1], [1, 2], 1],
        "reverse_transformer_layers_per_block": [1, [1, 2, 1], [1, 1, 2]],
    },
    "linear projections": {"use_linear_projection": True},
    "wide and narrow convolutions": {"conv_in_kernel": 5, "conv_out_kernel": 1},
    "sines first": {"flip_sin_to_cos": False, "freq_shift": 1},
    "unpadded downsampling": {"downsample_padding": 0},
    "time embedding of its own width": {"time_embedding_dim": 24},
    "odd base width": {
        "block_out_channels": [15, 30],
        "norm_num_groups": 5,
        "attention_head_dim": [3, 5],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
}


@pytest.mark.parametrize("for_cuda", [False, True], ids=["cpu", "cuda form"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_config_equals_diffusers(name: str, for_cuda: bool) -> None:
    torch.manual_seed(seed := fresh_seed())
    theirs = tiny_unet("sd1", seed, **VARIANTS[name])
    inputs = Inputs(theirs, 2, 6, 7)
    got = inputs.run(ours(theirs, for_cuda=for_cuda, kernels="torch" if for_cuda else "auto"))
    for row in range(2):
        assert difference(inputs.oracle(theirs, row), got[row : row + 1]) < TOLERANCE


def test_a_consistency_model_embeds_its_guidance_scale() -> None:
    torch.manual_seed(seed := fresh_seed())
    theirs = tiny_unet("sd1", seed, time_cond_proj_dim=18)
    inputs = Inputs(theirs, 1, 8, 8)
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    guidance = embed(None, torch.tensor([8.5 - 1.0]), embedding_dim=18)
    unet = ours(theirs)
    time = inputs.time(unet, guidance_embedding_scale=8.5)
    got = unet(inputs.latents, time, unet.text_kv(inputs.text))
    assert difference(inputs.oracle(theirs, 0, timestep_cond=guidance), got) < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_different_lengths_share_a_call(family: Family, attention: str) -> None:
    """A shorter text is padded; its row equals diffusers given the short text alone, whatever the padding holds."""
    torch.manual_seed(seed := fresh_seed())
    theirs = tiny_unet(family, seed)
    inputs = Inputs(theirs, 3, 6, 8, length=11)
    lengths = [4, 11, 1]
    for row, length in enumerate(lengths):
        inputs.text[row, length:] = 1e4
    got = inputs.run(ours(theirs, attention=attention), torch.tensor(lengths, dtype=torch.int32))
    for row, length in enumerate(lengths):
        assert difference(inputs.oracle(theirs, row, length), got[row : row + 1]) < TOLERANCE


def test_all_steps_are_projected_at_once() -> None:
    theirs = tiny_unet("sdxl", 1)
    unet = ours(theirs)
    timesteps = torch.tensor([999.0, 500.25, 0.0])
    request = {"pooled_prompt_embeds": torch.randn(POOLED_WIDTH), "time_ids": TIME_IDS}
    together = unet.time_projection(timesteps, **request)
    assert together.shape == (3, unet.time_width)
    for line, timestep in zip(together, timesteps, strict=True):
        torch.testing.assert_close(line, unet.time_projection(timestep[None], **request)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_near_fp32(family: Family) -> None:
    torch.manual_seed(seed := fresh_seed())
    theirs = tiny_unet(family, seed)
    inputs = Inputs(theirs, 2, 8, 8)
    got = inputs.run(ours(theirs, torch.bfloat16))
    assert got.dtype is torch.bfloat16
    with torch.no_grad():
        half = tiny_unet(family, seed).to(torch.bfloat16)
        cast = Inputs.__new__(Inputs)
        cast.__dict__ = {k: v if k == "timesteps" or v is None else v.bfloat16() for k, v in vars(inputs).items()}
    for row in range(2):
        exact = inputs.oracle(theirs, row)
        budget = difference(exact, cast.oracle(half, row))
        assert difference(exact, got[row : row + 1]) < max(2 * budget, 0.02)


def test_many_sizes_in_turn_stay_right() -> None:
    """Weights are kept in a layout per size, for a few sizes; one that was dropped is laid out anew."""
    torch.manual_seed(seed := fresh_seed())
    theirs = tiny_unet("sd1", seed)
    unet = ours(theirs)
    for side in [*range(4, 12), 4]:
        inputs = Inputs(theirs, 1, side, side + 1)
        assert difference(inputs.oracle(theirs, 0), inputs.run(unet)) < TOLERANCE


PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Stable Diffusion 1.5": (859_520_964, {"cross_attention_dim": 768}),
    "Stable Diffusion 1.5, inpainting": (859_535_364, {"cross_attention_dim": 768, "in_channels": 9}),
    "Stable Diffusion 2.1": (
        865_910_724,
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    ),
    "SDXL": (
        2_567_463_684,
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_diffusers_names_and_shapes(name: str) -> None:
    count, config = PUBLISHED[name]
    with torch.device("meta"):
        expected = {key: value.shape for key, value in UNet2DConditionModel(**config).state_dict().items()}
        got = {key: value.shape for key, value in UNet(config).state_dict().items()}
    assert got == expected
    assert sum(shape.numel() for shape in got.values()) == count


def test_channels_stay_last_from_end_to_end() -> None:
    theirs = tiny_unet("sd1", 0)
    got = Inputs(theirs, 2, 8, 8).run(ours(theirs))
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("down_block_types", ["SimpleCrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["KUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]),
        ("up_block_types", [["UpBlock2D"], "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]),
        ("down_block_types", ["DownBlock2D"]),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("dual_cross_attention", True),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("encoder_hid_dim", 64),
        ("addition_embed_type", "image"),
        ("attention_type", "gated"),
        ("act_fn", "gelu"),
        ("time_embedding_type", "fourier"),
        ("cross_attention_dim", [32, 64, 32]),
        ("attention_head_dim", 7),
        ("attention_head_dim", "8"),
        ("num_attention_heads", [2, 3, 2]),
        ("layers_per_block", 10**9),
        ("layers_per_block", True),
        ("block_out_channels", [16, -32, 32]),
        ("block_out_channels", {"0": 16}),
        ("norm_num_groups", 7),
        ("norm_eps", float("nan")),
        ("transformer_layers_per_block", [1, [2], 1]),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(key: str, value: object) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=key):
        UNet({**UNET_CONFIGS["sd1"], key: value})


def test_num_attention_heads_says_outright_what_attention_head_dim_says_wrongly() -> None:
    named = UNetConfig.from_dict({**UNET_CONFIGS["sd1"], "num_attention_heads": 4, "attention_head_dim": 8})
    assert {block.heads for block in named.down_blocks} == {4}


def test_sdxl_without_its_pooled_text_is_refused() -> None:
    unet = ours(tiny_unet("sdxl", 0))
    with pytest.raises(ValueError, match="pooled_prompt_embeds"):
        unet.time_projection(torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("kernels", "geglu", "others"),
    [("auto", "auto", "auto"), ("triton", "triton", "triton"), ("gate", "gate", "triton"), ("torch", "torch", "torch")],
)
def test_the_gate_of_a_feed_forward_may_be_named(
    kernels: str, geglu: str, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What auto takes on a GPU could not be asked for by name."""
    asked: dict[str, set[str]] = {}
    for name in ("geglu", "group_norm", "layer_norm", "add_residual_"):
        kernel = getattr(darkroom_kernels, name)

        def watched(*args: Any, implementation: str, name: str = name, kernel: Any = kernel, **rest: Any) -> Any:
            asked.setdefault(name, set()).add(implementation)
            return kernel(*args, implementation="torch", **rest)

        monkeypatch.setattr(darkroom_kernels, name, watched)
    unet = ours(tiny_unet("sd2", 1), kernels=kernels, for_cuda=True)
    unet(torch.zeros(1, 4, 8, 8), torch.zeros(1, unet.time_width), torch.zeros(1, 7, unet.text_kv_width))
    assert asked == {"geglu": {geglu}, "group_norm": {others}, "layer_norm": {others}, "add_residual_": {others}}
