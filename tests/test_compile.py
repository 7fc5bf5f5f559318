"""torch's compiler takes a UNet over while jobs run, or leaves it alone; no job notices either."""

from __future__ import annotations

import inspect
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
from tests.support.tiny_models import Family, tiny_unet, write_tiny_model
from tests.support.twin_device import TwinDevice
from tests.test_engine import CROWD

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
    gpu = torch.device("cuda")
    check_compile(settings, gpu)
    with pytest.raises(ConfigError, match="DARKROOM_GRAPHS=off"):
        check_compile(settings.model_copy(update={"graphs": "off"}), gpu)


def test_a_compiler_that_is_not_there_is_noticed() -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        problem = compiler_problem()
    assert problem is not None
    assert "C++ compiler" in problem


def test_nothing_is_prepared_when_the_setting_is_off(model: DiffusionModel, settings: Settings) -> None:
    prepare_compile([model], settings.model_copy(update={"compile": "off"}))()
    assert model.unet.compiled is None


def small_unet(*, kernels: str = "auto", for_cuda: bool = False) -> UNet:
    """One level with one residual block a side, in the form that torch's compiler reads, or in the form of CUDA."""
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
        unet = UNet(dict(theirs.config), kernels=kernels)
    unet.load_state_dict({name: value.clone() for name, value in theirs.state_dict().items()}, assign=True)
    return unet.fuse(for_cuda=for_cuda, onednn=False)


class Compiler:
    """Stands for torch's: what it makes computes the same, `off` by as much, and is counted by rows. Its `seconds_of`
    says that the hand-made path takes 1 s and what it makes `1 / speedup`.
    """

    def __init__(self, *, off: float = 0.0, speedup: float = 2.0) -> None:
        self.off, self.speedup = off, speedup
        self.compiled_for: list[int] = []
        self.calls: list[int] = []
        self._timed = 0

    def __call__(self, unet: UNet, inputs: Sequence[Tensor | None]) -> Callable[..., Tensor]:
        assert inputs[0] is not None
        self.compiled_for.append(inputs[0].shape[0])
        forward = inspect.unwrap(UNet.forward)

        def graph(*inputs: Tensor) -> Tensor:
            self.calls.append(inputs[0].shape[0])
            compiled, unet.compiled = unet.compiled, None
            try:
                return forward(unet, *inputs) + self.off  # type: ignore[no-any-return]
            finally:
                unet.compiled = compiled

        return graph

    def seconds_of(self, call: Callable[[], object], device: torch.device) -> float:
        self._timed += 1
        return 1.0 if self._timed % 2 else 1.0 / self.speedup


def slotted_inputs(unet: UNet, num_rows: int) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
    """As a warm-up has them: zeros, and a store of texts of which each row reads the first."""
    x, time_projection, _ = random_inputs(unet, num_rows, 8, 8, 7)
    store = torch.zeros(9, 7, unet.text_kv_width)
    return torch.zeros_like(x), torch.zeros_like(time_projection), store, None, torch.zeros(num_rows, dtype=torch.int64)


def test_graphs_are_compiled_in_the_warm_up_only() -> None:
    unet, compiler = small_unet(), Compiler()
    graphs = unet.compiled = CompiledGraphs(unet, compiler, compiler.seconds_of)
    for _ in range(2):
        for num_rows in (4, 2):
            unet(*random_inputs(unet, num_rows, 8, 8, 7))
    # One call to compare, one for each of those.
    assert compiler.calls == [4, 4, 2, 2, 4, 2]
    graphs.close()
    unet(*random_inputs(unet, 2, 8, 8, 7))
    unet(*random_inputs(unet, 3, 8, 8, 7))
    assert compiler.calls == [4, 4, 2, 2, 4, 2, 2]
    assert compiler.compiled_for == [4, 2]


@pytest.mark.parametrize(
    ("off", "speedup", "is_used"), [(0.0, 1.2, True), (0.5, 2.0, False), (float("nan"), 2.0, False), (0.0, 0.9, False)]
)
def test_a_graph_takes_over_only_if_it_agrees_and_is_faster(off: float, speedup: float, is_used: bool) -> None:
    """On a GPU whatever was compiled was used, right or wrong, faster or slower. Zeros, which a warm-up has, would not
    tell."""
    unet, compiler = small_unet(), Compiler(off=off, speedup=speedup)
    inputs = slotted_inputs(unet, 2)
    expected = unet(*inputs)
    graphs = unet.compiled = CompiledGraphs(unet, compiler, compiler.seconds_of)
    with structlog.testing.capture_logs() as lines:
        assert_close(unet(*inputs), expected)
        num_calls = len(compiler.calls)
        assert_close(unet(*inputs), expected)
    assert len(compiler.calls) - num_calls == is_used
    (trial,) = graphs.trials
    assert (trial.rows, trial.is_used, trial.speedup) == (2, is_used, pytest.approx(speedup))
    assert [line["event"] for line in lines] == ["compiled_network_in_use" if is_used else "compiled_network_not_used"]
    assert inputs[2].eq(0).all(), "the store of texts is as it was found"


def test_a_graph_is_compared_on_inputs_that_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the texts of other rows is right on zeros."""
    unet = tiny_cuda_unet("sd1")
    x, time_projection, _ = random_inputs(unet, 3, 8, 8, 7)
    store = torch.zeros(9, 7, unet.text_kv_width)
    compiler = Compiler()

    def confused(unet: UNet, inputs: Sequence[Tensor | None]) -> Callable[..., Tensor]:
        graph = compiler(unet, inputs)
        return lambda x, time, store, lengths, slots: graph(x, time, store, lengths, slots.roll(1))

    graphs = unet.compiled = CompiledGraphs(unet, confused, compiler.seconds_of)
    unet(x, time_projection, store, None, torch.zeros(3, dtype=torch.int64))
    assert [trial.is_used for trial in graphs.trials] == [False]


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


def tiny_cuda_unet(family: Family, seed: int = 5) -> UNet:
    """The whole UNet of a tiny family in the form of CUDA, with torch's operators."""
    theirs = tiny_unet(family, seed)
    with torch.device("meta"):
        unet = UNet(dict(theirs.config), kernels="torch")
    unet.load_state_dict({name: value.clone() for name, value in theirs.state_dict().items()}, assign=True)
    return unet.fuse(for_cuda=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(compiler_problem() is not None, reason="no C++ compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
def test_a_compiled_network_computes_the_same_with_the_kernels_of_a_gpu() -> None:
    """The real compiler and the interpreted kernels. It hands the norm behind `cat` a picture in NCHW, whatever was
    traced, and the norm read other memory then: every compiled picture on a GPU was wrong.
    """
    unet = small_unet(kernels="triton", for_cuda=True)
    with torch.inference_mode():
        inputs = random_inputs(unet, 2, 4, 4, 7)
        expected = unet(*inputs)
        graph = torch.compile(compiled.export(unet, inputs), dynamic=False)
        assert_close(graph(*inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_captured_ticks_of_compiled_graphs_draw_what_plain_ticks_draw(
    model: DiffusionModel, settings: Settings
) -> None:
    """On a GPU's twin, with the exported network in place of the compiled one."""
    model.unet = tiny_cuda_unet("sd1", 3)
    settings = settings.model_copy(update={"max_rows": 2})
    jobs = [job_for(model, str(i), **fields) for i, fields in enumerate(CROWD)]
    plain = run_jobs(model, jobs, settings)
    compiler = Compiler()
    graphs = model.unet.compiled = CompiledGraphs(model.unet, compiled.export, compiler.seconds_of)
    twin = run_jobs(model, jobs, settings, device=TwinDevice(), warm_up=True, on_ready=graphs.close)
    assert [(trial.rows, trial.is_used) for trial in graphs.trials] == [(2, True), (1, True)]
    for job in jobs:
        assert np.abs(twin.pixels(job.id) - plain.pixels(job.id)).max() <= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_form_of_cuda_can_be_exported_from_inference_mode() -> None:
    """With texts by slot, as ticks on a GPU call it, and with everything that it does in place."""
    unet = tiny_cuda_unet("sd2")
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
