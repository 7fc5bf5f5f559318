"""The benchmarks themselves: they run at toy size, resume where they stopped, and write what they say."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch
from darkroom.config import BUILTIN_MODEL, Settings, load_settings
from darkroom.diffusion.compiled import CompiledGraphs
from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.batcher import BatchKey, Candidate
from darkroom.worker.main import load_models
from darkroom_kernels.attention.tuning import Size
from darkroom_kernels.bench.cases import NETWORKS, SD15, SDXL, TOY, Case, cases
from darkroom_kernels.bench.measure import Result, measure_case
from darkroom_kernels.bench.report import sizes_to_tune, tune_attention, tune_kernels
from darkroom_kernels.bench.timing import Limits, relative_error, time_calls
from darkroom_kernels.winners import load_winners

from benchmarks import event_streams, fleet, quality
from benchmarks.arrivals import MIXED_STEPS, Arrival, percentile, poisson_trace
from benchmarks.families import TOY as TOY_FAMILY
from benchmarks.families import write_model
from benchmarks.gpu.__main__ import NO_DEVICE, main
from benchmarks.gpu.batching import BatchingSection, measure_capacity, play
from benchmarks.gpu.kernels import KernelsSection
from benchmarks.gpu.models import ModelsSection, Plan
from benchmarks.gpu.op_classes import class_of
from benchmarks.gpu.running import RunningEngine
from benchmarks.gpu.sections import Item, Measured, State, report, run_section, table
from benchmarks.policies import RequestLevelBatcher, SerialBatcher
from benchmarks.quality import compare, fast_paths, psnr_db
from benchmarks.record import FIELDS, Figure, record

CPU = torch.device("cpu")
KEY = BatchKey("model", 8, 8)


def candidate(id_: int, *, model_rows: int = 2, remaining: int = 5) -> Candidate:
    return Candidate(id_, KEY, model_rows, 1, remaining, waiting_since_s=0.0)


class ThreeItems:
    """A section whose items say when they are measured; `fails` names one that raises, `stops` one that is killed."""

    name = "three"

    def __init__(self, fails: str = "", stops: str = "") -> None:
        self.fails, self.stops = fails, stops
        self.measured: list[str] = []
        self.resumed: dict[str, dict[str, Any]] = {}

    def items(self) -> Iterable[Item]:
        for name in ("one", "two", "three"):
            yield Item(name, lambda n=name: self._measure(n), expected_s=0.0)

    def resume(self, found: dict[str, dict[str, Any]]) -> None:
        self.resumed = found

    def report(self, found: dict[str, dict[str, Any]], reasons: dict[str, str]) -> str:
        return ",".join(found)

    def _measure(self, name: str) -> Measured:
        if name == self.stops:
            raise KeyboardInterrupt
        if name == self.fails:
            raise RuntimeError("no such kernel")
        self.measured.append(name)
        return Measured([Figure(f"figure {name}", 1.0, "s", "exact", "detail")], {"name": name})


def run(section: Any, path: Path, results: Path | None = None, **options: Any) -> bool:
    state = State(path, {"commit": "abc"})
    return run_section(section, state, time_limit_s=options.pop("time_limit_s", 60.0), results=results, **options)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    state, results = tmp_path / "state.json", tmp_path / "results.csv"
    with pytest.raises(KeyboardInterrupt):
        run(ThreeItems(stops="two"), state, results)
    second = ThreeItems()
    assert run(second, state, results)
    assert second.measured == ["two", "three"]
    assert second.resumed == {"one": {"name": "one"}}
    assert [row["figure"] for row in rows_of(results)] == ["figure one", "figure two", "figure three"]
    third = ThreeItems()
    assert run(third, state, results)
    assert third.measured == []


def test_an_item_that_kills_its_process_twice_is_given_up(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(ThreeItems(stops="one"), tmp_path / "state.json")
    section = ThreeItems(stops="one")
    assert run(section, tmp_path / "state.json")
    assert section.measured == ["two", "three"]
    assert "not measured: one: the process died in it twice" in report(
        section, State(tmp_path / "state.json", {"commit": "abc"})
    )


def test_an_item_that_fails_is_reported_and_the_others_are_measured(tmp_path: Path) -> None:
    section = ThreeItems(fails="two")
    assert run(section, tmp_path / "state.json")
    shown = report(section, State(tmp_path / "state.json", {"commit": "abc"}))
    assert "one,three" in shown
    assert "not measured: two: RuntimeError: no such kernel" in shown


def test_the_time_limit_stops_a_section_and_the_next_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    assert not run(ThreeItems(), tmp_path / "state.json", time_limit_s=0.0, say=said.append)
    assert "run again to go on" in said[0]
    assert run(ThreeItems(), tmp_path / "state.json")


@pytest.mark.parametrize(
    ("only", "measured"), [(["t*e"], ["three"]), (["one", "tw"], ["one", "two"]), ([], ["one", "two", "three"])]
)
def test_items_are_picked_by_parts_of_their_names(tmp_path: Path, only: list[str], measured: list[str]) -> None:
    section = ThreeItems()
    run(section, tmp_path / "state.json", only=only)
    assert section.measured == measured


def test_what_another_commit_measured_is_not_taken_over(tmp_path: Path) -> None:
    run(ThreeItems(), tmp_path / "state.json")
    assert State(tmp_path / "state.json", {"commit": "def"}).found("three") == {}


def test_rows_of_an_earlier_release_stay_readable(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(",".join(FIELDS[:8]) + "\n2026-01-01,abc,command,old,1,s,device,versions\n")
    record([("new", 2.0, "s"), Figure("newer", 3.0, "s", "PSNR 50 dB", "fast")], path=path)
    old, new, newer = rows_of(path)
    assert (old["figure"], old["quality"], old["versions"]) == ("old", "", "versions")
    assert (new["value"], new["quality"]) == ("2", "")
    assert (newer["quality"], newer["detail"]) == ("PSNR 50 dB", "fast")


def test_no_gpu_is_said_in_one_line_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == NO_DEVICE
    (line,) = capsys.readouterr().err.splitlines()
    assert "sees no CUDA device" in line


def test_the_command_runs_a_section_in_its_own_process_and_prints_its_table(tmp_path: Path) -> None:
    arguments = ["--section", "kernels", "--device", "cpu", "--only", "attention", "--record"]
    paths = ["--state", str(tmp_path / "state.json"), "--results", str(tmp_path / "results.csv")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments, *paths],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "sdpa math" in done.stdout
    assert "== kernels" in done.stdout
    figures = {row["figure"]: row for row in rows_of(tmp_path / "results.csv")}
    row = figures["kernel attention self, toy, 2x64, 16 queries, 16 keys, 2 rows, float32, darkroom auto"]
    assert row["unit"] == "us"
    assert row["quality"].startswith("relative error")
    assert "of the limit, timed by wall" in row["detail"]
    assert row["command"] == "python -m benchmarks.gpu --section kernels --device cpu"


def test_every_kernel_is_timed_and_compared_with_fp32(tmp_path: Path) -> None:
    section = KernelsSection(CPU)
    state = State(tmp_path / "state.json", {})
    assert run_section(section, state, time_limit_s=60.0, say=lambda line: None)
    found = state.found("kernels")
    assert {data["op"] for data in found.values()} == {case.op for case in cases((TOY,), (2,))}
    for name, data in found.items():
        auto = data["ways"]["darkroom auto"]
        assert auto["us"] > 0, name
        assert auto["error"] < 1e-5, name
    shown = report(section, state)
    assert "attention self: auto is" in shown
    assert "not here: attention self, flash-attn: ModuleNotFoundError" in shown


def test_a_way_that_writes_in_place_is_judged_on_fresh_inputs() -> None:
    case = next(case for case in cases((TOY,), (2,), itemsize=4) if case.op == "residual")
    results = measure_case(case, CPU, torch.float32, Limits(1e12, 1e12), budget_s=0.01, compiled=False)
    assert all(result.error < 1e-6 for result in results if not result.reason)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch, when its compiler is imported
def test_the_compiled_reference_computes_the_same() -> None:
    case = next(case for case in cases((TOY,), (2,), itemsize=4) if case.op == "layer_norm" and case.is_compiled)
    torch.compiler.set_stance("force_eager")
    try:
        results = measure_case(case, CPU, torch.float32, Limits(1e12, 1e12), budget_s=0.01)
    finally:
        torch.compiler.set_stance("default")
    (compiled,) = (result for result in results if result.way == "compiled reference")
    assert compiled.reason == ""
    assert compiled.error < 1e-6


def test_the_shapes_are_those_of_the_published_networks() -> None:
    """Heads, head sizes and tokens as counted on diffusers' classes."""
    shapes = {(c.network, c.shape) for c in cases(rows=(2,)) if c.op == "attention self"}
    assert ("SD1.5 512", "8x40, 4096 queries, 4096 keys") in shapes
    assert ("SD1.5 512", "8x160, 64 queries, 64 keys") in shapes
    assert ("SD2.1 768", "5x64, 9216 queries, 9216 keys") in shapes
    assert {shape for name, shape in shapes if name == "SDXL 1024"} == {
        "10x64, 4096 queries, 4096 keys",
        "20x64, 1024 queries, 1024 keys",
    }
    assert SD15.norm_widths(0) == [320, 640, 960]
    assert SD15.norm_widths(3) == [1280, 2560]
    assert SDXL.norm_widths(2) == [640, 1280, 1920, 2560]


def test_work_is_counted_as_products_and_traffic() -> None:
    case = next(c for c in cases((SDXL,), (2,)) if c.op == "attention self")
    assert case.flops == 4 * 2 * 10 * 4096 * 4096 * 64
    assert case.num_bytes == 2 * 4 * 2 * 10 * 4096 * 64


def test_tuning_measures_every_attention_once_and_stops_at_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list(sizes_to_tune(NETWORKS))
    assert len(set(sizes)) == len(sizes) == 30
    for size in ((4096, 4096, False), (4096, 77, True), (4096, 154, True)):
        assert Size(16, 10, 64, *size) in sizes
    reached: list[Size] = []

    def tune(sizes: Iterable[Size], *_: object) -> list[Any]:
        reached.extend(sizes)
        return []

    monkeypatch.setattr("darkroom_kernels.bench.report.tune", tune)
    said: list[str] = []
    tune_attention(CPU, quick=False, time_limit_s=-1.0, say=said.append)
    assert len(reached) == 1
    assert "stopped at the time limit, after 1 shapes" in said


def test_tuning_writes_the_winner_of_each_kernel_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU's toy shapes; only torch's forms and the interpreter's run there."""
    path = tmp_path / "winners.json"
    path.write_text("{}")
    seconds = {"torch": 2e-6, "darkroom triton": 1e-6, "darkroom gate": 3e-6}

    def measured(case: Case, *_: Any, ways: tuple[str, ...], **__: Any) -> list[Result]:
        wrong = case.op == "residual"
        return [Result(way, seconds[way], error=1.0 if wrong and way != "torch" else 1e-4) for way in ways]

    monkeypatch.setattr("darkroom_kernels.bench.report.measure_case", measured)
    said: list[str] = []
    tune_kernels(CPU, quick=False, time_limit_s=60.0, say=said.append, networks=(TOY,), path=path)
    (kernels,) = load_winners(path).values()
    assert {op: {row.winner for row in rows} for op, rows in kernels.items()} == {
        "group_norm": {"triton"},
        "layer_norm": {"triton"},
        "geglu": {"triton"},
        "residual": {"torch"},
        "step": {"triton"},
    }
    assert [row.size for row in kernels["layer_norm"]] == [128]
    assert kernels["geglu"][0].times_us == {"torch": 2.0, "gate": 3.0, "triton": 1.0}
    assert said[-1] == f"wrote {path}"
    tune_kernels(CPU, quick=False, time_limit_s=-1.0, say=said.append, networks=(TOY,), path=path)
    assert "stopped at the time limit" in said[-1]


def test_times_and_errors_are_what_they_say() -> None:
    calls: list[int] = []
    timing = time_calls([lambda: calls.append(0), lambda: calls.append(1)], CPU, budget_s=0.001)
    assert timing.how == "wall"
    assert calls[:4] == [0, 1, 0, 1]
    assert relative_error(torch.tensor([1.1]), torch.tensor([1.0])) == pytest.approx(0.1, rel=1e-3)
    assert math.isinf(relative_error(torch.tensor([math.nan]), torch.tensor([1.0])))


@pytest.fixture(scope="module")
def models_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelsSection, State]]:
    directory = tmp_path_factory.mktemp("models")
    plan = Plan((TOY_FAMILY,), (1, 2), (), (2,), num_steps=2, num_seeds=2, quality_steps=2, rounds=1)
    section = ModelsSection(plan, load_settings(device="cpu"), CPU, directory)
    state = State(directory / "state.json", {})
    assert run_section(section, state, time_limit_s=100.0, results=directory / "results.csv", say=lambda line: None)
    yield section, state
    section.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries among themselves
def test_whole_models_are_compared_with_diffusers_in_the_same_run(models_state: tuple[ModelsSection, State]) -> None:
    section, state = models_state
    found = state.found("models")
    assert [entry.get("reason") for entry in state.items["models"].values() if entry["status"] != "done"] == []
    assert {"toy 64 darkroom 1", "toy 64 darkroom 2", "toy 64 diffusers eager 2", "toy 64 breakdown 2"} <= set(found)
    assert found["toy 64 darkroom 2"]["sustained"] > 0
    shown = report(section, state)
    assert "diffusers eager" in shown
    assert "batch 2: UNet" in shown
    assert "convolution" in shown


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries among themselves
def test_a_models_row_has_speed_and_quality_together(models_state: tuple[ModelsSection, State]) -> None:
    _, state = models_state
    rows = {row["figure"]: row for row in rows_of(state.path.with_name("results.csv"))}
    row = next(row for name, row in rows.items() if "batch 2, darkroom, rate" in name)
    assert row["unit"] == "images/s"
    assert row["quality"].startswith("PSNR")
    assert "sustained" in row["detail"]


def test_the_compiled_engine_is_measured_beside_the_hand_made_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker starts it with DARKROOM_COMPILE=on, with one bucket. The compiler's part is played."""

    def prepared(models: Iterable[DiffusionModel], settings: Settings) -> Callable[[], None]:
        assert settings.compile == "on"
        (model,) = models
        graphs = model.unet.compiled = CompiledGraphs(
            model.unet, lambda unet, inputs: lambda *again: unet(*again), lambda *_: 1.0
        )
        return graphs.close

    monkeypatch.setattr("benchmarks.gpu.models.prepare_compile", prepared)
    plan = Plan((TOY_FAMILY,), (1,), (1,), (), num_steps=2, num_seeds=0, rounds=1)
    section = ModelsSection(plan, load_settings(device="cpu"), CPU, tmp_path)
    state = State(tmp_path / "state.json", {})
    try:
        assert run(
            section,
            state.path,
            tmp_path / "results.csv",
            only=["toy 64 darkroom"],
            time_limit_s=900.0,
            say=lambda _: None,
        )
    finally:
        section.close()
    rows = {row["figure"]: row for row in rows_of(tmp_path / "results.csv")}
    row = next(row for name, row in rows.items() if "batch 1, darkroom compiled, rate" in name)
    assert "bucket 2: compiled in 0 s, 1.000x the hand-made UNet, largest difference 0.0e+00, not used" in row["detail"]
    assert any("darkroom compiled: darkroom is as fast as" in name for name in rows)


@pytest.mark.parametrize(
    ("kernel", "label"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32", "convolution"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix product"),
        ("void at::native::RowwiseMomentsCUDAKernel", "norm"),
        ("void at::native::vectorized_elementwise_kernel", "elementwise and copies"),
        ("_statistics", "norm"),
        ("_geglu_gate", "elementwise and copies"),
        ("_geglu_described", "matrix product"),
        ("few_keys_kernel", "attention"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, label: str) -> None:
    assert class_of(kernel) == label


@pytest.fixture(scope="module")
def running() -> Iterator[RunningEngine]:
    settings = load_settings(device="cpu", max_rows=8)
    (model,) = load_models(settings, [BUILTIN_MODEL]).values()
    # Whatever size it was trained at: small pictures take less time.
    model.card = msgspec.structs.replace(model.card, width=64, height=64)
    engine = RunningEngine(model, settings)
    yield engine
    engine.close()


def test_a_poisson_trace_is_the_same_each_time_and_only_closer_at_a_higher_rate() -> None:
    trace, again, faster = poisson_trace(5.0, 20.0), poisson_trace(5.0, 20.0), poisson_trace(10.0, 10.0)
    assert trace == again
    assert [a.num_inference_steps for a in trace] == [a.num_inference_steps for a in faster]
    assert [a.at_s for a in trace] == pytest.approx([2 * a.at_s for a in faster])
    assert 70 < len(trace) < 130
    assert {a.num_inference_steps for a in trace} == set(MIXED_STEPS)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99)] == [50.0, 95.0, 99.0]
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)


def test_a_request_level_batch_takes_nobody_in_until_its_last_member_is_done() -> None:
    batcher = RequestLevelBatcher((2, 4, 8))
    first = batcher.choose([candidate(1), candidate(2)], 0.0)
    assert first is not None
    assert set(first.ids) == {1, 2}
    with_newcomers = batcher.choose([candidate(1), candidate(2), candidate(3, remaining=1)], 1.0)
    assert with_newcomers is not None
    assert set(with_newcomers.ids) == {1, 2}
    last = batcher.choose([candidate(2), candidate(3, remaining=1), candidate(4)], 2.0)
    assert last is not None
    assert last.ids == (2,)
    following = batcher.choose([candidate(3, remaining=1), candidate(4)], 3.0)
    assert following is not None
    assert set(following.ids) == {3, 4}
    assert batcher.choose([], 4.0) is None


def test_a_request_level_batch_is_no_larger_than_the_largest_bucket() -> None:
    choice = RequestLevelBatcher((2, 4)).choose([candidate(id_) for id_ in range(5)], 0.0)
    assert choice is not None
    assert set(choice.ids) == {0, 1}


def test_one_by_one_serves_in_order_of_arrival() -> None:
    batcher = SerialBatcher((2, 4, 8))
    chosen = [
        batcher.choose([candidate(id_, remaining=9 - id_) for id_ in range(first, 4)], 0.0) for first in (0, 0, 1, 3)
    ]
    assert [choice.ids for choice in chosen if choice is not None] == [(0,), (0,), (1,), (3,)]


@pytest.mark.parametrize(("policy", "most"), [(RequestLevelBatcher, 4), (SerialBatcher, 1)])
def test_every_policy_draws_every_picture(running: RunningEngine, policy: Callable[..., Any], most: int) -> None:
    running.use(policy(running.buckets))
    trace = [Arrival(0.0, steps, seed) for seed, steps in enumerate((2, 4, 3, 2, 3))]
    point = play(running, trace, window_s=0.1, drain_s=60.0)
    assert point.num_unfinished == 0
    assert len(point.latencies_s) == len(trace)
    assert max(tick.num_rows for tick in point.ticks) == most


def test_an_overloaded_point_counts_what_is_unfinished_with_its_age(running: RunningEngine) -> None:
    running.use(SerialBatcher(running.buckets))
    trace = [Arrival(0.0005 * seed, 50, seed) for seed in range(60)]
    point = play(running, trace, window_s=0.02, drain_s=60.0)
    assert point.num_unfinished > 0
    assert len(point.latencies_s) < len(trace)
    assert running.draw([]).ended_s == {}


def test_the_batching_section_prints_a_table_and_draws_its_plot(tmp_path: Path, running: RunningEngine) -> None:
    capacity = measure_capacity(running, 8)
    assert capacity > 0
    section = BatchingSection(
        lambda: running, "toy", window_s=1.5, loads=(0.8,), policies=("step", "request"), plots=tmp_path / "plot.png"
    )
    state = State(tmp_path / "state.json", {})
    state.entry("batching", "capacity").update(status="done", data={"images_per_s": max(capacity, 2.0)})
    assert run_section(section, state, time_limit_s=60.0, results=tmp_path / "results.csv", say=lambda line: None)
    shown = report(section, state)
    assert "tick:" in shown
    assert "request" in shown
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    figures = [row["figure"] for row in rows_of(tmp_path / "results.csv")]
    assert any("p95 latency" in figure and "step at 0.8" in figure for figure in figures)


def test_quality_is_high_for_equal_pictures_and_falls_with_noise() -> None:
    randomness = np.random.default_rng(0)
    picture = randomness.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    noisy = (picture.astype(int) + randomness.integers(-3, 4, picture.shape)).clip(0, 255).astype(np.uint8)
    equal, off = compare([picture], [picture]), compare([noisy], [picture])
    assert equal.psnr_db == (100.0,)
    assert equal.ssim is not None
    assert off.ssim is not None
    assert off.ssim[0] < equal.ssim[0] == pytest.approx(1.0)
    assert 38 < off.psnr_db[0] < 48
    assert psnr_db(np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)) == 0.0
    assert "1 seeds against fp32" in str(off)


def test_every_fast_path_of_a_device_is_held_against_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(device="cpu")
    monkeypatch.setattr(quality, "choose_device", lambda name: torch.device("cuda"))
    paths = dict(fast_paths(settings, compiled=True))
    offered = set(get_args(Settings.model_fields["attention"].annotation)) - {"auto", "reference"}
    assert {path.attention for path in paths.values()} == offered | {"auto"}
    assert {path.dtype for path in paths.values()} == {"fp32", "fp16", "bf16"}
    assert paths["fp16, GEGLU of one kernel"].kernels == "triton"
    assert [label for label, path in paths.items() if path.compile == "on"] == [
        "fp32, compiled", "fp16, compiled", "bf16, compiled",
    ]  # fmt: skip


def test_a_path_that_cannot_run_is_named_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(device="cpu", num_threads=1)
    named = [("xformers", settings.model_copy(update={"attention": "xformers"})), ("fp32", settings)]
    monkeypatch.setattr(quality, "fast_paths", lambda *_, **__: named)
    path = write_model(TOY_FAMILY, tmp_path, CPU)
    figures = quality.measure("toy", path, settings, 2, compiled=False, num_seeds=2)
    assert [figure.name for figure in figures] == ["quality, toy, 2 steps, plain fp32", "quality, toy, 2 steps, fp32"]
    assert figures[1].quality.startswith("PSNR")
    assert "quality, toy, xformers: not measured: attention 'xformers' is unavailable" in capsys.readouterr().out


def test_tables_are_aligned() -> None:
    assert table([("name", "s"), ("a", "1.5"), ("bb", "12.5")]).splitlines() == [
        "name     s",
        "----------",
        "a      1.5",
        "bb    12.5",
    ]


def test_a_toy_fleet_runs_on_one_redis_and_its_table_is_sane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(fleet, "SLOWLOG_S", 1.0)
    arguments = [
        "--models", "sd15", "--workers", "3", "--most-rate", "30", "--picture-bytes", "40000",
        "--worker-processes", "2", "--client-processes", "1", "--cancelled-share", "0.2",
        "--warm-up-s", "0.8", "--window-s", "1.2", "--record",
    ]  # fmt: skip
    [point] = fleet.main(arguments)
    assert point.workers == 3
    assert 0 < point.achieved <= 2 * point.offered < 120
    assert point.refused == point.failed == 0
    assert 0 < point.claim_s[0] <= point.claim_s[1] < 5
    assert point.idle_share < point.main_share < 1
    assert point.main_share < point.redis_share + 0.1
    assert point.idle_commands < point.commands < point.inner_commands
    assert {"enqueue", "claim", "settle", "status"} <= {term.name for term in point.terms}
    assert "computed end/s" in capsys.readouterr().out
    figures = {row["figure"]: row for row in rows_of(tmp_path / "results.csv")}
    assert len(figures) == 4
    assert all("3 simulated workers, 40 kB pictures" in name for name in figures)


def test_what_limits_a_fleet_is_named() -> None:
    calm = fleet.Point(
        load=fleet.LOADS["sdxl"], workers=8, idle_share=0.01, idle_commands=0.0, offered=10.0, achieved=10.0,
        refused=0.0, failed=0.0, commands=100.0, inner_commands=900.0, main_share=0.03, redis_share=0.03, used_bytes=0,
        generator_share=0.2, machine_share=0.3, claim_s=(0.001, 0.002), enqueue_p99_s=0.001, lag_p99_s=0.001, terms=[],
    )  # fmt: skip
    assert calm.limit == "none"
    assert calm.redis_s_per_job == pytest.approx(0.002)
    assert calm.computed_end == pytest.approx(445)
    assert replace(calm, main_share=0.95, machine_share=1.0).limit == "redis"
    assert replace(calm, generator_share=0.9, claim_s=(0.1, 0.5)).limit == "generator"
    assert replace(calm, machine_share=0.97).limit == "machine"
    assert replace(calm, claim_s=(0.01, 0.2)).limit == "claims"


def test_the_assumed_tick_times_stay_below_what_the_device_could_do() -> None:
    for model, row_flops in (("sd15", 803.3e9), ("sdxl", 6761e9)):
        limit = fleet.PEAK_FLOPS / (2 * 20 * row_flops)
        assert 0.5 * limit < fleet.LOADS[model].capacity < 0.7 * limit


async def test_event_streams_are_measured_in_a_process_of_their_own() -> None:
    figures = {figure.name: figure.value for figure in await event_streams.measure(num_streams=8, num_samples=4)}
    assert 0 <= figures.pop("memory of 8 idle event streams") < 100
    assert len(figures) == 4
    assert all(value > 0 for value in figures.values())
