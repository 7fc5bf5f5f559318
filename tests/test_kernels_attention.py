"""Every attention implementation that runs here agrees with the fp32 reference, and none falls back in silence."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from darkroom_kernels import Implementation, attention
from darkroom_kernels.attention import api, sdpa_backends, tiles
from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.attention.xformers_form import xformers_problem
from darkroom_kernels.backend import KernelUnavailable
from torch.utils._python_dispatch import TorchDispatchMode

IMPLEMENTATIONS = ["auto", "sdpa", "reference"]


def inputs(batch: int = 3, heads: int = 2, queries: int = 5, keys: int = 7, dim: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, length, dim) for length in (queries, keys, keys))
    return q, k, v


def test_the_reference_is_softmax_attention() -> None:
    q, k, v = inputs()
    expected = torch.softmax(q.double() @ k.double().transpose(-1, -2) / 8**0.5, -1) @ v.double()
    torch.testing.assert_close(reference_attention(q, k, v).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("queries", "keys", "dim"), [(5, 7, 8), (1, 1, 3), (64, 77, 40), (33, 129, 64)])
def test_sizes_need_not_be_round(implementation: str, queries: int, keys: int, dim: int) -> None:
    q, k, v = inputs(queries=queries, keys=keys, dim=dim)
    got = attention(q, k, v, implementation=implementation)
    torch.testing.assert_close(got, reference_attention(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_keys_take_no_part_and_a_row_without_keys_gives_zeros(implementation: str) -> None:
    q, k, v = inputs()
    lengths = torch.tensor([7, 3, 0], dtype=torch.int32)
    k[1, :, 3:], v[1, :, 3:] = 1e4, 1e4
    got = attention(q, k, v, key_lengths=lengths, implementation=implementation)
    short = attention(q[1:2], k[1:2, :, :3], v[1:2, :, :3], implementation=implementation)
    torch.testing.assert_close(got[1:2], short, rtol=1e-4, atol=1e-5)
    assert torch.equal(got[2], torch.zeros_like(got[2]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_views_of_one_projection_give_the_same(implementation: str) -> None:
    torch.manual_seed(0)
    fused = torch.randn(2, 9, 3, 4, 8)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    got = attention(q, k, v, implementation=implementation)
    expected = reference_attention(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_given_scale_replaces_the_usual_one(implementation: str) -> None:
    q, k, v = inputs()
    got = attention(q, k, v, scale=0.7, implementation=implementation)
    torch.testing.assert_close(got, reference_attention(q * 0.7 * 8**0.5, k, v), rtol=1e-4, atol=1e-5)


def test_bf16_loses_no_more_than_pytorch_does() -> None:
    q, k, v = (value.bfloat16() for value in inputs(queries=64, keys=77, dim=64))
    exact = reference_attention(q.float(), k.float(), v.float())
    budget = (F.scaled_dot_product_attention(q, k, v).float() - exact).abs().max()
    assert (attention(q, k, v).float() - exact).abs().max() <= budget * 1.01


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_read_the_keys_of_their_slots(implementation: str) -> None:
    q, k, v = inputs(batch=4)
    slots = torch.tensor([2, 0, 2, 3])
    lengths = torch.tensor([7, 2, 5, 0], dtype=torch.int32)
    got = attention(q, k[:, :, :7], v, key_lengths=lengths, key_slots=slots, implementation=implementation)
    expected = reference_attention(q, k[slots], v[slots], lengths)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_heads_of_the_result_are_joined_without_a_copy(implementation: str) -> None:
    got = attention(*inputs(), implementation=implementation)
    assert got.transpose(1, 2).flatten(2)._base is not None
    assert got.transpose(1, 2).is_contiguous()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'fastest'"):
        attention(*inputs(), implementation="fastest")


def test_a_named_choice_that_cannot_run_says_why_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "xformers_problem", lambda: "the package xformers is not installed")
    monkeypatch.setattr(api, "triton_problem", lambda device: "the package triton cannot be imported")
    api.forget_choices()
    for name, reason in (("xformers", "xformers is not installed"), ("triton", "triton cannot be imported")):
        with pytest.raises(KernelUnavailable, match=f"'{name}' is unavailable: the package {reason}"):
            attention(*inputs(), implementation=name)
    assert api.choose(torch.device("cuda"), torch.float16, 40, 4096, 4096) is Implementation.SDPA
    api.forget_choices()


def test_an_xformers_that_does_not_load_is_named_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("")
    (tmp_path / "xformers" / "ops.py").write_text("raise OSError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    assert xformers_problem.__wrapped__() == "xformers does not load (OSError: built for another torch)"
    monkeypatch.delitem(sys.modules, "xformers", raising=False)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "num_queries", "num_keys", "expected"),
    [
        (torch.float16, 40, 4096, 4096, "triton"),
        (torch.bfloat16, 80, 1024, 1024, "triton"),
        (torch.float16, 160, 256, 256, "triton"),
        (torch.float16, 64, 4096, 4096, "cudnn"),
        (torch.bfloat16, 128, 4096, 4096, "cudnn"),
        (torch.float16, 64, 4096, 77, "triton"),
        (torch.float16, 64, 1024, 154, "triton"),
        (torch.float16, 512, 4096, 4096, "sdpa"),
        (torch.float32, 40, 4096, 4096, "sdpa"),
        (torch.float64, 40, 4096, 4096, "sdpa"),
    ],
)
def test_auto_on_hopper_takes_triton_or_cudnn_where_they_should_be_ahead_and_sdpa_elsewhere(
    dtype: torch.dtype, head_dim: int, num_queries: int, num_keys: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choices without a measurement: a table that has been measured on this device would say its own."""
    monkeypatch.setattr(tiles, "device_kinds", lambda device: ["sm_90"])
    tiles.row_for.cache_clear()
    api.forget_choices()
    assert api.choose(torch.device("cuda"), dtype, head_dim, num_queries, num_keys).value == expected
    tiles.row_for.cache_clear()
    api.forget_choices()


@pytest.fixture
def fresh_choices() -> Iterator[None]:
    def forget() -> None:
        tiles.row_for.cache_clear()
        api.forget_choices()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh_choices")
def test_before_hopper_auto_leaves_the_choice_of_a_backend_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "device_kinds", lambda device: ["sm_80"])
    monkeypatch.setattr(api, "device_kinds", lambda device: ["sm_80"])
    assert api.choose(torch.device("cuda"), torch.float16, 64, 4096, 4096) is Implementation.SDPA


@pytest.mark.usefixtures("fresh_choices")
def test_auto_takes_the_fastest_measured_one_that_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    times_us = {"xformers": 1.0, "flash": 2.0, "triton": 3.0, "sdpa": 4.0}
    row = tiles.measured_row(16, 64, 4096, 4096, tiles.Tile("flash", 64, 64, 4, 2), times_us)
    monkeypatch.setattr(api, "row_for", lambda *_: row)
    for problem, expected in ((None, "xformers"), ("not installed", "flash")):
        monkeypatch.setattr(api, "xformers_problem", lambda problem=problem: problem)
        api.forget_choices()
        assert api.choose(torch.device("cuda"), torch.float16, 64, 4096, 4096).value == expected


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize("chosen", ["xformers", "cudnn"])
def test_auto_goes_on_with_sdpa_when_its_choice_refuses_and_remembers(
    chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A measured winner that loads and then takes none of the inputs ended the tick. By name it still does."""

    def refuses(*_: object) -> torch.Tensor:
        raise KernelUnavailable("none of these inputs")

    times_us = {chosen: 1.0, "sdpa": 4.0}
    row = tiles.measured_row(16, 64, 512, 512, tiles.Tile("flash", 64, 64, 4, 2), times_us)
    monkeypatch.setattr(api, "row_for", lambda *_: row)
    monkeypatch.setattr(api, "_problem", lambda *_: None)
    monkeypatch.setattr(api, "xformers_attention", refuses)
    monkeypatch.setattr(sdpa_backends, "attention_by", refuses)
    q = torch.empty(2, 3, 512, 64, device="meta", dtype=torch.float16)
    for _ in range(2):
        assert attention(q, q, q).shape == q.shape
    with pytest.raises(KernelUnavailable, match="none of these inputs"):
        attention(q, q, q, implementation=chosen)
    refusals = [record for record in caplog.records if "none of these inputs" in record.getMessage()]
    assert len(refusals) == 1


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_a_backend_of_torch_is_called_by_its_own_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by switches: those are the whole process's, and two threads compute attention."""
    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(sdpa_backends, "_takes", lambda *_: True)
    monkeypatch.setattr(api, "_problem", lambda *_: None)
    q = torch.empty(2, 3, 512, 64, device="meta", dtype=torch.float16)
    with Watching():
        out = attention(q, q, q, implementation=name)
    lengths = torch.ones(2, dtype=torch.int32, device="meta")
    with pytest.raises(KernelUnavailable, match="takes no key lengths"):
        attention(q, q, q, key_lengths=lengths, implementation=name)
    assert f"_scaled_dot_product_{name}_attention" in seen
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()


def test_what_a_backend_cannot_take_is_refused_by_name() -> None:
    q, k, v = inputs()
    for name in ("cudnn", "flash", "efficient"):
        with pytest.raises(KernelUnavailable, match=f"'{name}' is unavailable: it needs a CUDA device, not cpu"):
            attention(q, k, v, implementation=name)


@pytest.mark.usefixtures("fresh_choices")
def test_a_name_is_checked_for_the_device_that_was_chosen_and_not_for_one_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a GPU in the machine and DARKROOM_DEVICE=cpu, these passed the start and failed in the first tick."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(api, "xformers_problem", lambda: None)
    monkeypatch.setattr(api, "triton_problem", lambda device: None if device.type == "cuda" else "there is no kernel")
    for name, reason in (("triton", "there is no kernel"), ("xformers", "needs a CUDA device, not cpu")):
        assert api.check_available(name, torch.device("cuda")).value == name
        with pytest.raises(KernelUnavailable, match=reason):
            api.check_available(name, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "dtype", "dim", "is_refused"),
    [
        ("triton", torch.float16, 512, True),
        ("triton", torch.float16, 256, False),
        ("triton", torch.float32, 256, True),
        ("flash", torch.float16, 512, True),
        ("flash", torch.float32, 64, True),
        ("cudnn", torch.bfloat16, 128, False),
        ("efficient", torch.float32, 512, False),
        ("efficient", torch.float16, 44, True),
        ("sdpa", torch.float32, 512, False),
        ("xformers", torch.float32, 512, False),
    ],
)
def test_heads_that_an_implementation_has_no_kernel_for_are_known(
    name: str, dtype: torch.dtype, dim: int, is_refused: bool
) -> None:
    assert (api.head_refusal(name, torch.device("cuda"), dtype, dim) is not None) is is_refused


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"\[3, 2, 5, 8\]"):
        attention(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r"key_lengths \[3\]"):
        attention(q, k, v, key_lengths=torch.ones(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"key_slots \[3\]"):
        attention(q, k, v, key_slots=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="a query and a key at least"):
        attention(q, k[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match="one floating dtype"):
        attention(q, k.half(), v)
    with pytest.raises(ValueError, match="dense last axis"):
        attention(q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v)
    for scale in (-1.0, 0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"finite scale above 0, got {scale}"):
            attention(q, k, v, scale=scale)
    with pytest.raises(ValueError, match="keys of 3 rows"):
        attention(q, k[:2], v[:2])


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    api.forget_choices()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            attention(*inputs())
    assert [record.getMessage() for record in caplog.records] == ["attention on cpu: sdpa"]
