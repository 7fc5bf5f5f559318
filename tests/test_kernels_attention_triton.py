"""The Triton attention kernels: on a GPU or, without one, in Triton's interpreter."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from darkroom_kernels import attention, backend, check_kernels
from darkroom_kernels import check as kernel_check
from darkroom_kernels.attention import api, check, launch, tiles, tuning
from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.backend import KernelUnavailable
from darkroom_kernels.geglu import kernel as geglu_kernel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.support.interpreter import bf16_as_on_a_device  # noqa: F401

pytestmark = pytest.mark.usefixtures("bf16_as_on_a_device", "poisoned_memory")

# A dtype's own loss, as PyTorch shows it, is what a kernel may lose too; half again as much covers another order of
# sums, and the least is what fp32 sums of this length lose.
SHARE_OF_SDPA_ERROR = 1.5
LEAST_ERROR = {torch.float32: 3e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output starts as NaN, so a value that no kernel writes is seen."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(launch.torch, "empty", poisoned)


def inputs(
    device: torch.device, *, batch: int = 2, heads: int = 2, queries: int, keys: int, dim: int, slots: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q `[B, H, Lq, d]` and k, v `[S, H, Lk, d]` as views of `[B, L, H, d]` memory, fp32."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys + dim)
    sizes = ((batch, queries), (slots or batch, keys), (slots or batch, keys))
    q, k, v = (
        torch.randn(rows, length, heads, dim, generator=generator).to(device).transpose(1, 2) for rows, length in sizes
    )
    return q, k, v


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


def expect_close(got: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
    """Hold `got` against fp32 on the same, already rounded, inputs."""
    exact = reference_attention(q.float(), k.float(), v.float(), lengths)
    mask = None if lengths is None else api.key_mask(lengths, k.shape[2])
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    seen = torch.ones(q.shape[0], dtype=torch.bool, device=q.device) if lengths is None else lengths > 0
    budget = max(rms(theirs[seen].float() - exact[seen]) * SHARE_OF_SDPA_ERROR, LEAST_ERROR[q.dtype])
    assert rms(got.float() - exact) <= budget
    assert (got.float() - exact).abs().max() <= 20 * budget


@pytest.mark.parametrize("dim", [8, 16, 24, 40, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("keys", [77, 231])
def test_every_head_size_agrees_with_the_reference(kernel_device: torch.device, dim: int, keys: int) -> None:
    q, k, v = (part.half() for part in inputs(kernel_device, batch=1, queries=70, keys=keys, dim=dim))
    expect_close(attention(q, k, v, implementation="triton"), q, k, v)


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (63, 63), (63, 77), (111, 231), (64, 64), (128, 256), (200, 154)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sizes_need_not_be_round(kernel_device: torch.device, queries: int, keys: int, dtype: torch.dtype) -> None:
    q, k, v = (part.to(dtype) for part in inputs(kernel_device, batch=1, queries=queries, keys=keys, dim=40))
    expect_close(attention(q, k, v, implementation="triton"), q, k, v)


@pytest.mark.parametrize(("queries", "keys"), [(4095, 77), (111, 4095)])
def test_a_long_odd_sequence_agrees(kernel_device: torch.device, queries: int, keys: int) -> None:
    q, k, v = (part.half() for part in inputs(kernel_device, batch=1, heads=1, queries=queries, keys=keys, dim=40))
    expect_close(attention(q, k, v, implementation="triton"), q, k, v)


@pytest.mark.parametrize("keys", [77, 154, 300])
def test_rows_read_their_slot_and_their_own_number_of_keys(kernel_device: torch.device, keys: int) -> None:
    """What lies beyond a row's keys may be anything, NaN too; a row without keys gives zeros."""
    q, k, v = (part.half() for part in inputs(kernel_device, batch=4, queries=70, keys=keys, dim=40, slots=3))
    slots = torch.tensor([2, 0, 2, 1], device=kernel_device)
    lengths = torch.tensor([keys, 3, keys, 0], dtype=torch.int32, device=kernel_device)
    k[0, :, 3:], v[0, :, 3:] = float("nan"), float("nan")
    got = attention(q, k, v, key_lengths=lengths, key_slots=slots, implementation="triton")
    expect_close(got, q, k.nan_to_num(0.0)[slots], v.nan_to_num(0.0)[slots], lengths)
    assert torch.equal(got[3], torch.zeros_like(got[3]))


@pytest.mark.parametrize("dim", [40, 64])
def test_views_of_one_projection_and_odd_strides_need_no_copy(kernel_device: torch.device, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 70, 3, 2, dim, generator=generator).to(kernel_device).half()
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    got = attention(q, k, v, implementation="triton")
    expect_close(got, q, k, v)
    shifted = torch.randn(2, 2, 70, dim + 3, generator=generator).to(kernel_device).half()[..., 3:]
    assert shifted.stride(2) % 8
    expect_close(attention(shifted, k, v, implementation="triton"), shifted, k, v)
    expect_close(attention(q, k[:1].expand(2, -1, -1, -1), v, implementation="triton"), q, k[:1].expand_as(k), v)


@pytest.mark.parametrize("keys", [77, 231])
@pytest.mark.parametrize("size", [0.0, 1e-4, 30.0])
def test_extreme_values_stay_finite(kernel_device: torch.device, size: float, keys: int) -> None:
    """At 30 the largest scores come close to fp16's 65504 before they are scaled; fp32 holds them."""
    q, k, v = (part.mul(size).half() for part in inputs(kernel_device, batch=1, queries=64, keys=keys, dim=64))
    v = v.clamp(-100, 100)
    got = attention(q, k, v, implementation="triton")
    exact = reference_attention(q.float(), k.float(), v.float())
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.float(), exact, rtol=4e-3, atol=4e-3 * max(size, 1e-4))


@pytest.mark.parametrize("keys", [77, 231])
def test_scores_beyond_fp16_choose_one_key(kernel_device: torch.device, keys: int) -> None:
    q = torch.full((1, 1, 5, 64), 60.0, device=kernel_device, dtype=torch.float16)
    k = torch.full((1, 1, keys, 64), -60.0, device=kernel_device, dtype=torch.float16)
    k[0, 0, 7] = 60.0
    v = torch.arange(keys, device=kernel_device).half()[None, None, :, None].expand(1, 1, keys, 64).contiguous()
    got = attention(q, k, v, scale=1.0, implementation="triton")
    assert torch.equal(got, torch.full_like(got, 7.0))


def test_a_row_is_the_same_alone_and_in_any_crowd(kernel_device: torch.device) -> None:
    q, k, v = (part.half() for part in inputs(kernel_device, batch=3, queries=130, keys=77, dim=40))
    crowd = attention(q, k, v, implementation="triton")
    for row in range(3):
        alone = attention(q[row : row + 1], k[row : row + 1], v[row : row + 1], implementation="triton")
        assert torch.equal(alone[0], crowd[row])


def test_several_tiles_per_program_give_what_one_gives(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (part.half() for part in inputs(kernel_device, batch=1, queries=500, keys=77, dim=40))
    monkeypatch.setattr(launch, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(launch, "num_multiprocessors", lambda device: 1)
    results = [
        launch.run(tiles.Tile("few_keys", 64, 0, 4, 2, each), q, k, v, None, None, 40**-0.5) for each in (1, 3, 8)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_heads_of_the_result_are_joined_without_a_copy(kernel_device: torch.device) -> None:
    q, k, v = inputs(kernel_device, queries=5, keys=7, dim=16)
    got = attention(q, k, v, implementation="triton")
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [(512, torch.float16, "head size 512"), (256, torch.float32, "head size 256"), (40, torch.float64, "float64")],
)
def test_what_the_kernels_cannot_take_is_refused_by_name(
    kernel_device: torch.device, dim: int, dtype: torch.dtype, reason: str
) -> None:
    q, k, v = (part.to(dtype) for part in inputs(kernel_device, queries=5, keys=7, dim=dim))
    with pytest.raises(KernelUnavailable, match=f"'triton' is unavailable: .*{reason}"):
        attention(q, k, v, implementation="triton")


def test_the_op_itself_takes_any_strides(kernel_device: torch.device) -> None:
    """torch's compiler may hand it other strides than it traced."""
    q, k, v = inputs(kernel_device, queries=5, keys=7, dim=16)
    other = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in (q, k, v)]
    op = torch.ops.darkroom.attention.default
    torch.testing.assert_close(op(*other, None, None, 0.25), op(q, k, v, None, None, 0.25), rtol=0, atol=0)


def test_the_op_keeps_the_rules_of_its_registration(kernel_device: torch.device) -> None:
    q, k, v = inputs(kernel_device, queries=5, keys=7, dim=16)
    lengths = torch.tensor([7, 2], dtype=torch.int32, device=kernel_device)
    slots = torch.tensor([1, 0], device=kernel_device)
    checks = ("test_schema", "test_faketensor")
    for arguments in ((q, k, v, None, None, 0.25), (q, k, v, lengths, slots, 0.25)):
        torch.library.opcheck(torch.ops.darkroom.attention.default, arguments, test_utils=checks)


def test_fake_tensors_and_the_flop_counter_see_through() -> None:
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), counter:
        q = torch.empty(2, 8, 4096, 40, device="cuda", dtype=torch.float16)
        out = attention(q, q, q)
    assert out.shape == q.shape
    assert out.stride() == (4096 * 320, 40, 320, 1)
    assert counter.get_total_flops() == 4 * 2 * 8 * 4096 * 4096 * 40


def test_a_compiled_model_traces_through(kernel_device: torch.device) -> None:
    q, k, v = inputs(kernel_device, queries=5, keys=7, dim=16)

    def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, implementation="triton").transpose(1, 2).flatten(2) * 2

    compiled = torch.compile(joined, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(q, k, v), joined(q, k, v))


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Failures of a self-check end with the test."""
    yield
    backend._failed.clear()
    api.forget_choices()


@pytest.mark.usefixtures("forgetful")
def test_the_self_check_passes(kernel_device: torch.device) -> None:
    assert check_kernels(kernel_device, torch.float16, [16, 40])
    assert check_kernels(kernel_device, torch.bfloat16, [16], kernels="triton")


@pytest.mark.usefixtures("forgetful")
def test_the_self_check_tries_what_a_tick_asks_for(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole tiles without lengths or slots, and the GEGLU that "triton" names or that was measured to be the fastest:
    each is a build of its own."""

    def wrong_when_plain(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, slots: Tensor | None, scale: float):
        exact = reference_attention(q, k if slots is None else k[slots], v if slots is None else v[slots], lengths)
        return exact.neg() if slots is None else exact

    monkeypatch.setattr(check, "triton_attention", wrong_when_plain)
    monkeypatch.setattr(geglu_kernel, "geglu", lambda x, weight, bias: x.new_zeros(x.shape[0], weight.shape[0] // 2))
    monkeypatch.setattr(kernel_check, "winners_of", lambda kernel, device: set())
    assert not check_kernels(kernel_device, torch.float16, [16])
    assert backend.failure("geglu", kernel_device) is None
    assert any("head size 16 and 256 keys" in text for text in caplog.messages)
    for kernels, winners in (("triton", set()), ("auto", {"gate", "triton"})):
        monkeypatch.setattr(kernel_check, "winners_of", lambda kernel, device, found=winners: found)
        check_kernels(kernel_device, torch.float16, [], kernels=kernels)
        assert "off by" in (backend.failure("geglu", kernel_device) or "")
        backend._failed.clear()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("broken", ["wrong", "raises"])
def test_a_kernel_that_fails_its_check_is_not_used(
    kernel_device: torch.device, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def instead(*arguments: object) -> Tensor:
        if broken == "raises":
            raise RuntimeError("ptxas fell over")
        return torch.zeros(2, 3, 150, 16, device=kernel_device)

    monkeypatch.setattr(check, "triton_attention", instead)
    assert not check_kernels(kernel_device, torch.float16, [16])
    assert any("ptxas fell over" in text or "off by" in text for text in caplog.messages)
    assert api.choose(kernel_device, torch.float16, 16, 64, 64) is not api.Implementation.TRITON
    q, k, v = inputs(kernel_device, queries=5, keys=7, dim=16)
    with pytest.raises(KernelUnavailable, match="self-check"):
        attention(q, k, v, implementation="triton")


# The table of tiles.


def test_every_size_up_to_the_largest_has_a_tile_on_every_class_of_device() -> None:
    for kind, dim, keys in itertools.product(
        ("sm_80", "sm_90", "sm_100"), (8, 40, 64, 96, 160, 256), (1, 77, 231, 9216)
    ):
        rows = tiles.load_table()[kind]
        assert any(row.holds(16, dim, 4096, keys) and row.tile.kernel == "flash" for row in rows)


def test_a_cut_holds_its_size_and_wastes_less_than_one_block() -> None:
    for size in range(1, 257):
        first, second = tiles.split(size)
        assert first + second >= size
        assert first in (16, 32, 64, 128, 256)
        assert second in (0, 16, 32, 64, 128)
    assert [tiles.split(size) for size in (40, 64, 77, 80, 154, 160)] == [
        (32, 16), (64, 0), (64, 16), (64, 16), (128, 32), (128, 32),
    ]  # fmt: skip


def test_a_measured_table_is_written_and_read_back_with_its_winners(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(tiles.TABLE.read_text())
    tile = tiles.candidate_tiles(16, 40, 4096, 4096)[0]
    rows = [
        tiles.measured_row(16, 40, 4096, 4096, tile, {"triton": 90.0, "sdpa": 120.5}),
        tiles.measured_row(16, 40, 1024, 77, tile, {"triton": 9.0, "sdpa": 8.5}),
        tiles.measured_row(16, 40, 256, 77, tile, {"triton": 3.0, "sdpa": 3.5}),
    ]
    tiles.save_table("NVIDIA H200 sm_90", rows, path)
    table = tiles.load_table(path)
    few, text, picture = table["NVIDIA H200 sm_90"]
    assert (few.winner, text.winner, picture.winner) == ("triton", "sdpa", "triton")
    assert few.holds(16, 40, 256, 77)
    assert not few.holds(16, 40, 257, 77)
    assert text.holds(16, 40, 9216, 77)
    assert not text.holds(16, 40, 256, 81)
    assert picture.holds(16, 40, 9216, 9216)
    assert picture.times_us == {"triton": 90.0, "sdpa": 120.5}
    assert table["sm_90"] == tiles.load_table()["sm_90"]


def test_a_measurement_speaks_for_its_head_size_and_for_few_keys_or_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(tiles.TABLE.read_text())
    kind = "NVIDIA H200 sm_90"
    tile = tiles.Tile("flash", 64, 32, 4, 2)
    tiles.save_table(kind, [tiles.measured_row(16, 64, 4096, 4096, tile, {"triton": 9.0, "sdpa": 8.0})], path)
    table = tiles.load_table(path)
    monkeypatch.setattr(tiles, "load_table", lambda: table)
    monkeypatch.setattr(tiles, "device_kinds", lambda device: [kind, "sm_90"])
    find = functools.partial(tiles.row_for.__wrapped__, torch.device("cuda"), 16)
    assert find(64, 9216, 9216).winner == "sdpa"
    for sizes in ((40, 4096, 4096), (64, 4096, 77), (64, 4096, 154)):
        assert find(*sizes) in table["sm_90"]
        assert not find(*sizes).measured


def test_tuning_again_replaces_only_the_head_sizes_that_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    old, new = tiles.Tile("flash", 64, 32, 4, 2), tiles.Tile("flash", 128, 64, 4, 3)
    sizes = ((40, 4096, 4096), (64, 9216, 9216), (64, 4096, 77))
    tiles.save_table("x sm_90", [tiles.measured_row(16, *size, old, {"triton": 9.0}) for size in sizes], path)
    tiles.save_table("x sm_90", [tiles.measured_row(16, 64, 4096, 4096, new, {"triton": 8.0})], path)
    rows = tiles.load_table(path)["x sm_90"]
    assert [(row.max_head_dim, row.max_keys, row.tile) for row in rows] == [
        (40, None, old), (64, 80, old), (64, None, new),
    ]  # fmt: skip


def test_no_default_row_claims_a_measurement() -> None:
    for kind, rows in tiles.load_table().items():
        assert all(not row.measured and row.winner is None for row in rows) or kind not in ("sm_80", "sm_90", "sm_100")


def test_tuning_writes_the_fastest_right_tile_and_the_winner(
    kernel_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    wrong, slow, fast = (tiles.Tile("few_keys", 64, 0, 4, stages) for stages in (1, 2, 3))
    monkeypatch.setattr(tiles, "candidate_tiles", lambda *sizes: [wrong, slow, fast])
    times = itertools.chain([3e-6, 2e-6, 5e-6], itertools.repeat(7e-6))

    def by_tile(tile: tiles.Tile, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        return torch.zeros_like(q) if tile == wrong else attention(q, k, v, key_slots=slots, implementation="reference")

    monkeypatch.setattr(tuning, "_by_tile", by_tile)
    size = tuning.Size(batch=2, heads=1, head_dim=16, num_queries=20, num_keys=77, has_slots=True)
    (row,) = tuning.tune([size], kernel_device, torch.float16, lambda call: next(times), path)
    assert row.tile == fast
    assert row.winner == "triton"
    assert row.times_us["triton"] == 2.0
    assert row.times_us["sdpa"] == 5.0
    (saved,) = next(iter(tiles.load_table(path).values()))
    assert saved.tile == fast
    assert saved.measured


def test_a_size_that_fails_and_a_tile_that_spills_leave_the_others_tuned(
    kernel_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    spilling, good = (tiles.Tile("few_keys", 64, 0, 4, stages) for stages in (1, 2))
    monkeypatch.setattr(tiles, "candidate_tiles", lambda *sizes: [spilling, good])
    times = itertools.chain([1e-6, 2e-6], itertools.repeat(5e-6))

    def launched(tile: tiles.Tile, q: Tensor, *_: object) -> tuple[Tensor, object]:
        return q, SimpleNamespace(n_spills=4 if tile == spilling else 0)

    monkeypatch.setattr(tuning, "launch", launched)
    sizes = [tuning.Size(1, 1, 16, 20, 0), tuning.Size(1, 1, 16, 20, 77)]
    (row,) = tuning.tune(sizes, kernel_device, torch.float16, lambda call: next(times), path)
    assert row.tile == good
    with pytest.raises(RuntimeError, match="no size could be tuned"):
        tuning.tune(sizes[:1], kernel_device, torch.float16, lambda call: 1.0, path)
    assert [saved.tile for rows in tiles.load_table(path).values() for saved in rows] == [good]
