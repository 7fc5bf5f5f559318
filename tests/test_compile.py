"""torch's compiler takes a UNet over while jobs run, or leaves it alone; no job notices either."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
import torch._inductor.config
from darkroom.config import Settings, load_settings
from darkroom.diffusion import compiled
from darkroom.diffusion.compiled import CompiledGraphs, Library, compile_library, compiler_problem, random_inputs
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.diffusion.unet import UNet
from darkroom.errors import ConfigError
from darkroom.worker import compile as worker_compile
from darkroom.worker.compile import (
    CompileOrder,
    CompileReport,
    check_compile,
    compile_in_background,
    order_for,
    prepare_compile,
    run_child,
    take_over,
)
from torch import Tensor
from torch.testing import assert_close

from tests.support.engines import job_for, run_jobs
from tests.support.tiny_models import tiny_unet, write_tiny_model

CPU = torch.device("cpu")
GOOD = CompileReport(seconds=60.0, difference=1e-6, is_close=True, speedup=1.4)


@pytest.fixture(autouse=True)
def quiet_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler traces every tensor to a logger; pytest would keep all of it, which takes minutes."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=3)


@pytest.fixture
def model(directory: Path) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(directory)
    torch.set_num_threads(threads)


@pytest.fixture
def settings() -> Settings:
    return load_settings(num_threads=1, encode_threads=1, compile="on")


class PlainForm:
    """Stands for a compiled network: it computes the same by other kernels, and counts its calls."""

    def __init__(self, directory: Path) -> None:
        self.unet = compiled.load_unet(directory, torch.float32, is_plain=True)
        self.num_calls = 0

    def fits(self, *_: Any) -> bool:
        return True

    def __call__(self, x: Tensor, time_projection: Tensor, text_kv: Tensor, *texts: Tensor | None) -> Tensor:
        self.num_calls += 1
        return self.unet(x, time_projection, text_kv, *texts)  # type: ignore[no-any-return]


def test_a_compiled_network_takes_over_between_two_ticks_of_running_jobs(
    model: DiffusionModel, directory: Path, settings: Settings
) -> None:
    jobs = [{"seed": 1}, {"seed": 2, "guidance_scale": 1.0}, {"seed": 3, "sampler": "euler_a"}]
    before = run_jobs(model, [job_for(model, str(i), **fields) for i, fields in enumerate(jobs)], settings)
    stand_in, switched_after = PlainForm(directory), 3
    forward, num_ticks = model.unet.forward, 0

    def counted(*inputs: Any) -> Tensor:
        nonlocal num_ticks
        num_ticks += 1
        if num_ticks == switched_after + 1:
            model.unet.compiled = stand_in
        return forward(*inputs)  # type: ignore[no-any-return]

    model.unet.forward = counted  # type: ignore[method-assign]
    after = run_jobs(model, [job_for(model, str(i), **fields) for i, fields in enumerate(jobs)], settings)
    assert 0 < stand_in.num_calls == num_ticks - switched_after
    for i in range(len(jobs)):
        assert np.abs(before.pixels(str(i)) - after.pixels(str(i))).max() <= 1


class FakeLibrary:
    def __init__(self, path: Path, **sizes: int) -> None:
        assert path.read_text() == "compiled"
        self.sizes = sizes

    def fits(self, *_: Any) -> bool:
        return False


def writes(report: CompileReport) -> Callable[[CompileOrder], CompileReport]:
    def build(order: CompileOrder) -> CompileReport:
        Path(order.library).write_text("compiled")
        return report

    return build


def test_a_library_that_agrees_and_is_faster_is_used_for_the_models_own_size(
    model: DiffusionModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_compile, "Library", FakeLibrary)
    assert take_over(model, settings, writes(GOOD))
    assert isinstance(model.unet.compiled, FakeLibrary)
    assert model.unet.compiled.sizes == {"height": 8, "width": 8, "length": 77, "max_rows": settings.max_rows}


@pytest.mark.parametrize(
    "report",
    [
        CompileReport(seconds=60.0, difference=0.2, is_close=False, speedup=2.0),
        CompileReport(seconds=60.0, difference=1e-6, is_close=True, speedup=0.97),
    ],
    ids=["another result", "slower"],
)
def test_a_library_that_disagrees_or_is_slower_is_not_used(
    model: DiffusionModel, settings: Settings, report: CompileReport
) -> None:
    with structlog.testing.capture_logs() as lines:
        assert not take_over(model, settings, writes(report))
    assert model.unet.compiled is None
    assert [line["event"] for line in lines] == ["compiled_network_not_used"]


def test_a_failed_compile_is_logged_and_jobs_go_on(model: DiffusionModel, settings: Settings) -> None:
    def broken(order: CompileOrder) -> CompileReport:
        raise RuntimeError("no room on the disk")

    with structlog.testing.capture_logs() as lines:
        compile_in_background([model], settings, broken).join()
    assert [(line["event"], line["reason"]) for line in lines] == [("compile_failed", "no room on the disk")]
    assert run_jobs(model, [job_for(model, "a")], settings).images("a")


def test_a_child_that_dies_is_an_error_with_its_last_words(
    model: DiffusionModel, settings: Settings, tmp_path: Path
) -> None:
    model.path = tmp_path / "gone"
    with pytest.raises(RuntimeError, match=r"status 1: .*no such file"):
        run_child(order_for(model, settings, tmp_path / "unet.so"))


def test_reproducible_mode_and_a_missing_compiler_are_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_compile(load_settings(batching="reproducible"), CPU)
    with pytest.raises(ConfigError, match="DARKROOM_BATCHING=reproducible"):
        check_compile(settings.model_copy(update={"batching": "reproducible"}), CPU)
    monkeypatch.setattr(worker_compile, "compiler_problem", lambda: "no C++ compiler")
    with pytest.raises(ConfigError, match=r"DARKROOM_COMPILE=on: no C\+\+ compiler"):
        check_compile(settings, CPU)
    check_compile(settings, torch.device("cuda"))


def test_a_compiler_that_is_not_there_is_noticed() -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        problem = compiler_problem()
    assert problem is not None
    assert "C++ compiler" in problem


def test_nothing_is_prepared_when_the_setting_is_off(model: DiffusionModel, settings: Settings) -> None:
    prepare_compile([model], settings.model_copy(update={"compile": "off"}))()
    assert model.unet.compiled is None


def small_unet() -> UNet:
    """One level with one residual block a side, in the form that torch's compiler reads."""
    theirs = tiny_unet(
        "sd1",
        5,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        attention_head_dim=2,
    )
    with torch.device("meta"):
        unet = UNet(dict(theirs.config))
    unet.load_state_dict({name: value.clone() for name, value in theirs.state_dict().items()}, assign=True)
    return unet.fuse(onednn=False)


def test_graphs_are_compiled_in_the_warm_up_only() -> None:
    compiled_for = []

    def fake(unet: UNet, inputs: Sequence[Tensor | None]) -> Callable[..., Tensor]:
        assert inputs[0] is not None
        compiled_for.append(inputs[0].shape[0])
        return lambda *inputs: torch.full_like(inputs[0], 7.0)

    unet = small_unet()
    graphs = unet.compiled = CompiledGraphs(unet, fake)
    for _ in range(2):
        for num_rows in (4, 2):
            assert unet(*random_inputs(unet, num_rows, 8, 8, 7)).eq(7.0).all()
    graphs.close()
    assert unet(*random_inputs(unet, 2, 8, 8, 7)).eq(7.0).all()
    assert not unet(*random_inputs(unet, 3, 8, 8, 7)).eq(7.0).any()
    assert compiled_for == [4, 2]


def test_a_graph_that_cannot_be_compiled_is_left_to_the_hand_made_path() -> None:
    def refuse(unet: UNet, inputs: Sequence[Tensor | None]) -> Callable[..., Tensor]:
        raise RuntimeError("no such instruction\nand a page of details")

    unet = small_unet()
    inputs = random_inputs(unet, 2, 8, 8, 7)
    expected = unet(*inputs)
    unet.compiled = CompiledGraphs(unet, refuse)
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            assert_close(unet(*inputs), expected)
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("compile_failed", "RuntimeError: no such instruction")
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_form_of_cuda_can_be_exported_from_inference_mode() -> None:
    """With texts by slot, as ticks on a GPU call it, and with everything that it does in place."""
    theirs = tiny_unet("sd2", 5)
    with torch.device("meta"):
        unet = UNet(dict(theirs.config), kernels="torch")
    unet.load_state_dict({name: value.clone() for name, value in theirs.state_dict().items()}, assign=True)
    unet.fuse(for_cuda=True)
    with torch.inference_mode():
        x, time_projection, store = random_inputs(unet, 3, 8, 8, 7)
        inputs = (x, time_projection, store, None, torch.tensor([2, 0, 0]))
        expected = unet(*inputs)
        exported = compiled.export(unet, inputs)
        assert_close(exported(*inputs), expected)
        assert_close(exported(*inputs), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(compiler_problem() is not None, reason="no C++ compiler")
def test_a_library_computes_what_the_network_computes(tmp_path: Path) -> None:
    """The real compiler, on a network of one block; inputs it was not made for are refused before they reach it."""
    unet = small_unet()
    sizes = {"height": 8, "width": 12, "length": 7, "max_rows": 4}
    compile_library(unet, tmp_path / "unet.so", **sizes)
    library = Library(tmp_path / "unet.so", **sizes)
    for num_rows in (1, 3, 4):
        inputs = random_inputs(unet, num_rows, 8, 12, 7)
        assert library.fits(inputs[0], inputs[2], None, None)
        assert_close(library(*inputs), unet(*inputs), atol=1e-4, rtol=1e-4)
    for num_rows, height, length in ((5, 8, 7), (1, 12, 7), (1, 8, 6)):
        inputs = random_inputs(unet, num_rows, height, 12, length)
        assert not library.fits(inputs[0], inputs[2], None, None)
