"""Where Triton kernels run, and how a choice is made or refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from darkroom_kernels import backend
from torch._subclasses.fake_tensor import FakeTensorMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    def forget() -> None:
        backend.uses_triton.cache_clear()
        backend.triton_problem.cache_clear()
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
    backend.uses_triton.cache_clear()
    backend.triton_problem.cache_clear()
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
