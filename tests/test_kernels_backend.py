"""Where Triton kernels run, and how a choice is made or refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import pytest
import torch
from darkroom_kernels import backend, winners
from darkroom_kernels.geglu import api as geglu
from torch._subclasses.fake_tensor import FakeTensorMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    def forget() -> None:
        backend.forget_decisions()
        backend._failed.clear()

    forget()
    yield
    forget()


def test_auto_takes_triton_on_a_cuda_device_and_never_on_a_cpu() -> None:
    assert backend.uses_triton("auto", CUDA)
    assert not backend.uses_triton("auto", CPU)
    assert not backend.uses_triton("torch", CUDA)


@without_a_gpu
def test_triton_by_name_runs_on_a_cpu_under_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.uses_triton("triton", CPU)
    backend.forget_decisions()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(backend.KernelUnavailable, match=r"'triton' is unavailable: .*TRITON_INTERPRET=1"):
        backend.uses_triton("triton", CPU)


def test_an_old_device_is_refused_by_name_and_left_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not backend.uses_triton("auto", CUDA)
    with pytest.raises(backend.KernelUnavailable, match=r"8\.0 or newer, and this device has 7\.5"):
        backend.uses_triton("triton", CUDA)


def test_a_kernel_that_failed_its_check_is_left_by_auto_and_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    backend.mark_failed("geglu", CUDA, "off by 3.0")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert not backend.uses_triton("auto", CUDA, "geglu")
    assert backend.uses_triton("auto", CUDA, "group_norm")
    with pytest.raises(backend.KernelUnavailable, match=r"geglu 'triton' is unavailable: off by 3\.0"):
        backend.uses_triton("triton", CUDA, "geglu")


def test_auto_takes_what_was_measured_to_be_fastest_at_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "winners.json"
    path.write_text("{}")
    rows = [winners.Row(4096, {"torch": 1.0, "triton": 2.0}), winners.Row(100, {"torch": 2.0, "triton": 1.0})]
    winners.save_winners("some GPU sm_90", "step", rows, path)
    gates = [
        winners.Row(320, {"torch": 3.0, "gate": 2.0, "triton": 1.0}),
        winners.Row(640, {"torch": 1.0, "gate": 2.0}),
    ]
    winners.save_winners("some GPU sm_90", "geglu", gates, path)
    table = winners.load_winners(path)
    assert [row.size for row in table["some GPU sm_90"]["step"]] == [100, 4096]
    monkeypatch.setattr(winners, "load_winners", lambda: table)
    monkeypatch.setattr(winners, "device_kinds", lambda device: ["some GPU sm_90", "sm_90"])
    winners.winner_for.cache_clear()
    sizes = (64, 100, 101, 5000)
    assert [backend.uses_triton("auto", CUDA, "step", size) for size in sizes] == [True, True, False, False]
    assert backend.uses_triton("triton", CUDA, "step", 5000), "a name is a demand"
    assert backend.uses_triton("auto", CUDA, "group_norm", 5000), "of others nothing is known"
    assert not backend.uses_triton("auto", CPU, "step", 64)
    forms = [geglu.choose("auto", CUDA, inner) for inner in (64, 320, 640, 1280)]
    assert forms == ["triton", "triton", "torch", "torch"]
    assert geglu.choose("gate", CUDA, 320) == "gate"
    backend.mark_failed("geglu", CUDA, "off by 3.0")
    assert geglu.choose("auto", CUDA, 320) == "torch"
    monkeypatch.undo()
    winners.winner_for.cache_clear()


def test_nothing_is_claimed_to_be_measured_that_was_not() -> None:
    """A row of `winners.json` is written by `darkroom bench kernels --tune`, and names a product."""
    for kind, kernels in winners.load_winners().items():
        assert kind.rpartition(" sm_")[0]
        assert all(row.times_us for rows in kernels.values() for row in rows)


def test_every_kernel_has_an_enum_of_its_implementations() -> None:
    for name in ("attention", "geglu", "group_norm", "layer_norm", "residual", "step"):
        kind = importlib.import_module(f"darkroom_kernels.{name}").Implementation
        assert issubclass(kind, Enum)
        assert {"auto", "triton"} <= {one.value for one in kind}


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'fast' is unknown, expected one of \['auto', 'triton', 'torch'\]"):
        backend.uses_triton("fast", CPU)


def test_without_the_package_the_reason_is_named() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, darkroom_kernels; from darkroom_kernels import backend\n"
        "assert not backend.uses_triton('auto', torch.device('cuda'))\n"
        "print(backend.triton_problem(torch.device('cuda')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "triton cannot be imported (ModuleNotFoundError" in done.stdout


def test_a_registered_op_is_seen_through_by_fake_tensors() -> None:
    op = backend.register(
        "test_double(Tensor x) -> Tensor", lambda x: x * 2, lambda x: torch.empty_like(x, dtype=x.dtype)
    )
    assert torch.equal(op(torch.ones(3)), torch.full((3,), 2.0))
    with FakeTensorMode():
        assert op(torch.empty(5, 7, device="cuda")).shape == (5, 7)
