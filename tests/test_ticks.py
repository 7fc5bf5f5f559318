"""Ticks as a GPU runs them: captured as graphs, one enqueued ahead, state at fixed addresses. On a CPU, by its twin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from darkroom.config import Settings, load_settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.engine.batch import Batch, Tick
from darkroom.engine.decode import Decoder
from darkroom.engine.device import WARM_UP_CALLS, CudaDevice, comes_from_cuda, is_device_lost
from darkroom.engine.engine import Engine
from darkroom.engine.events import Cancelled, Event, Failed, Finished, Saved, TickReport
from darkroom.engine.lane import Lane
from darkroom.engine.pool import RowPool
from darkroom.errors import ConfigError, DeviceLost
from darkroom.jobs import Job
from structlog.testing import capture_logs

from tests.support.engines import Outcome, job_for, run_jobs
from tests.support.tiny_models import write_tiny_model
from tests.support.twin_device import TwinDevice
from tests.test_engine import CROWD

REPRODUCIBLE = {"batching": "reproducible", "reproducible_rows": 6}
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
NOT_PERMITTED = torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The form of the kernels that a graph can hold.
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=3), kernels="torch")
    torch.set_num_threads(threads)


def settings_with(**fields: object) -> Settings:
    return load_settings(num_threads=1, encode_threads=1, **fields)


def run_on_twin(
    model: DiffusionModel,
    jobs: list[Job],
    settings: Settings,
    device: TwinDevice | None = None,
    **options: Any,
) -> tuple[Outcome, TwinDevice]:
    """As a worker runs them: graphs captured first."""
    device = device or TwinDevice()
    return run_jobs(model, jobs, settings, device=device, warm_up=True, **options), device


def test_captured_ticks_draw_what_plain_ones_draw_bit_for_bit(model: DiffusionModel) -> None:
    settings = settings_with(**REPRODUCIBLE)
    jobs = [job_for(model, str(i), **fields) for i, fields in enumerate(CROWD)]
    plain = run_jobs(model, jobs, settings)
    twin, device = run_on_twin(model, jobs, settings)
    assert max(tick.num_rows for tick in twin.ticks) > 2
    for job in jobs:
        assert twin.images(job.id) == plain.images(job.id)
    # Two more ticks are those of the picture that nobody gets.
    assert device.log.count("replay") == len(twin.ticks) + 2


def test_captured_ticks_of_many_buckets_draw_what_plain_ones_draw(model: DiffusionModel) -> None:
    jobs = [job_for(model, str(i), **fields) for i, fields in enumerate(CROWD)]
    plain = run_jobs(model, jobs, settings_with())
    twin, device = run_on_twin(model, jobs, settings_with())
    assert len({tick.choice.bucket for tick in twin.ticks}) > 2
    assert device.log.count("replay") == len(twin.ticks) + 2
    for job in jobs:
        assert np.abs(twin.pixels(job.id) - plain.pixels(job.id)).max() <= 1


@pytest.mark.parametrize("joining_step", range(1, 6))
def test_a_row_may_join_and_leave_captured_ticks_at_any_step_of_another(
    model: DiffusionModel, joining_step: int
) -> None:
    settings = settings_with(**REPRODUCIBLE)
    host, guest = job_for(model, "host", num_inference_steps=8, seed=1), job_for(model, "guest", **CROWD[1])

    def join(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == joining_step:
            engine.submit(guest)

    together, _ = run_on_twin(model, [host], settings, expected=2, on_tick=join)
    assert sum(tick.joined for tick in together.ticks) == 2
    for job in (host, guest):
        assert together.images(job.id) == run_jobs(model, [job], settings).images(job.id)


def test_every_bucket_is_captured_largest_first_and_other_sizes_run_call_by_call(model: DiffusionModel) -> None:
    settings = settings_with(max_rows=8)
    jobs = [job_for(model, "own"), job_for(model, "other", width=72, height=40)]
    plain = run_jobs(model, jobs, settings)
    twin, device = run_on_twin(model, jobs, settings)
    assert device.log.count("capture") == len((1, 2, 4, 8))
    assert device.log.count("replay") == 2 + sum(tick.progress[0][0].id == "own" for tick in twin.ticks)
    for job in jobs:
        assert np.abs(twin.pixels(job.id) - plain.pixels(job.id)).max() <= 1


def test_sizes_named_by_a_setting_are_captured_too(model: DiffusionModel) -> None:
    settings = settings_with(max_rows=2, graph_sizes="72x40, 64x64")
    assert settings.graph_sizes_px == ((72, 40), (64, 64))
    twin, device = run_on_twin(model, [job_for(model, "other", width=72, height=40)], settings)
    # The model's own size is named twice, and captured once.
    assert device.log.count("capture") == 2 * len((1, 2))
    assert device.log.count("replay") == len(twin.ticks) + 2


@pytest.mark.parametrize("sizes", ["768", "768x", "0x64", "64x64x64", "64x-8", ",", "wide"])
def test_a_malformed_list_of_sizes_is_refused_with_its_name(sizes: str) -> None:
    with pytest.raises(ConfigError, match=r"DARKROOM_GRAPH_SIZES=.*expected sizes as 768x512"):
        load_settings(graph_sizes=sizes)


def test_a_size_that_is_none_of_the_models_stops_the_start(model: DiffusionModel) -> None:
    engine = Engine(
        {model.id: model},
        settings_with(graph_sizes="65x64"),
        on_event=lambda _: None,
        warm_up=True,
        device=TwinDevice(),
    )
    with pytest.raises(ConfigError, match=r"DARKROOM_GRAPH_SIZES: 65x64 is no size of model .* multiples of 8"):
        engine.run()


def test_a_tick_is_enqueued_while_one_runs_and_never_two(model: DiffusionModel) -> None:
    _, device = run_on_twin(model, [job_for(model, "a", num_inference_steps=9)], settings_with())
    assert device.most_in_flight == 2


def test_a_bucket_that_cannot_be_captured_runs_call_by_call(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = model.unet.forward

    def looks_at_values(x: torch.Tensor, *rest: object) -> torch.Tensor:
        if x.shape[0] == 2:
            float(x.sum())
        return step(x, *rest)

    monkeypatch.setattr(model.unet, "forward", looks_at_values)
    jobs = [job_for(model, "two"), job_for(model, "one", guidance_scale=1.0)]
    for job in jobs:
        twin, device = run_on_twin(model, [job], settings_with(max_rows=2))
        assert twin.images(job.id)
        # What warms up is guided, so it has two model rows as well.
        assert device.log.count("replay") == (len(twin.ticks) if job.id == "one" else 0)


def test_activations_of_the_warm_up_and_of_the_graphs_are_never_there_together(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph's memory is its own. Calls of one bucket between captures of others held as much again, unplanned."""
    order: list[str] = []
    compute, capture = Lane.compute, TwinDevice.capture

    def computes(lane: Lane, *arguments: Any) -> None:
        order.append("call")
        compute(lane, *arguments)

    def captures(device: TwinDevice, work: Callable[[], None]) -> Callable[[], None]:
        order.append("capture")
        return capture(device, work)

    monkeypatch.setattr(Lane, "compute", computes)
    monkeypatch.setattr(TwinDevice, "capture", captures)
    run_on_twin(model, [job_for(model, "one")], settings_with(max_rows=4))
    assert order[: 3 * WARM_UP_CALLS + 1] == ["call"] * 3 * WARM_UP_CALLS + ["capture"]


def test_decodings_share_calls_in_numbers_that_were_met_before_anybody_waits(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN tries algorithms out at the start only, and for each number anew: calls of 5 or 7 had none of it."""
    sizes: list[int] = []
    decode, at_ready = model.vae.decode, 0

    def counted(latents: torch.Tensor) -> torch.Tensor:
        sizes.append(latents.shape[0])
        return decode(latents)

    def ready() -> None:
        nonlocal at_ready
        at_ready = len(sizes)

    monkeypatch.setattr(model.vae, "decode", counted)
    job = job_for(model, "many", num_images_per_prompt=7, num_inference_steps=2)
    twin, _ = run_on_twin(model, [job], settings_with(), on_ready=ready)
    assert sizes[:at_ready] == [1, 2, 4, 8, 1]
    assert sum(sizes[at_ready:]) == 7
    assert set(sizes[at_ready:]) <= {1, 2, 4}
    plain = run_jobs(model, [job], settings_with())
    for index in range(7):
        assert np.abs(twin.pixels("many", index) - plain.pixels("many", index)).max() <= 1


def test_reproducible_pictures_are_tried_one_by_one(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda latents: (sizes.append(latents.shape[0]), decode(latents))[1])
    run_on_twin(model, [job_for(model, "a", num_images_per_prompt=3)], settings_with(**REPRODUCIBLE))
    assert set(sizes) == {1}


def test_a_decoding_that_fails_when_it_is_tried_out_stops_the_start(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(latents: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such algorithm")

    monkeypatch.setattr(model.vae, "decode", broken)
    engine = Engine(
        {model.id: model}, settings_with(max_rows=2), on_event=lambda _: None, warm_up=True, device=TwinDevice()
    )
    with pytest.raises(RuntimeError, match="no such algorithm"):
        engine.run()


def test_noise_is_copied_for_the_rows_of_a_tick_and_not_for_its_padding(model: DiffusionModel) -> None:
    copied: list[int] = []

    class Watching(TwinDevice):
        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            if target.ndim == 4:
                copied.append(target.shape[0])
            super().copy(target, source)

    settings = settings_with(**REPRODUCIBLE)
    jobs = [job_for(model, "noisy", sampler="euler_a"), job_for(model, "quiet", num_inference_steps=9)]
    twin, _ = run_on_twin(model, jobs, settings, Watching())
    plain = run_jobs(model, jobs, settings)
    assert set(copied) <= {1, 2}
    for job in jobs:
        assert twin.images(job.id) == plain.images(job.id)


def test_a_finishing_row_leaves_its_latents_in_memory_that_it_had_from_the_start(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tick allocates nothing, the last one of a picture included."""
    enqueue, was_there = Batch.enqueue, []

    def watched(batch: Batch, *arguments: Any) -> Tick:
        held = [row.last_latents for row in batch.rows]
        tick = enqueue(batch, *arguments)
        was_there.extend(any(latents is last for last in held) for latents in tick.finished.values())
        return tick

    monkeypatch.setattr(Batch, "enqueue", watched)
    run_on_twin(model, [job_for(model, str(i), seed=i) for i in range(3)], settings_with(max_rows=4))
    assert was_there == [True] * 4


def test_more_rows_than_slots_wait_for_each_other(model: DiffusionModel) -> None:
    jobs = [job_for(model, str(i), seed=i, num_images_per_prompt=3, guidance_scale=1.0 + i % 2) for i in range(7)]
    settings = settings_with(max_rows=2, **REPRODUCIBLE | {"reproducible_rows": 2})
    most = 0

    def look(engine: Engine, *_: object) -> None:
        nonlocal most
        (lane,) = engine._lanes.values()
        most = max(most, lane.pool.num_used)
        assert lane.pool.latents.shape[0] == 4

    twin, _ = run_on_twin(model, jobs, settings, on_tick=look)
    assert most == 4
    plain = run_jobs(model, jobs, settings)
    for job in jobs:
        assert twin.images(job.id) == plain.images(job.id)


def test_more_texts_than_the_store_holds_wait_for_each_other(model: DiffusionModel) -> None:
    jobs = [job_for(model, str(i), prompt="a cat " * i, negative_prompt="red " * i, seed=i) for i in range(1, 10)]
    settings = settings_with(max_rows=2, prompt_cache_bytes=0, **REPRODUCIBLE | {"reproducible_rows": 2})
    twin, _ = run_on_twin(model, jobs, settings)
    plain = run_jobs(model, jobs, settings)
    for job in jobs:
        assert twin.images(job.id) == plain.images(job.id)


def test_a_postponed_job_can_be_cancelled(model: DiffusionModel) -> None:
    jobs = [
        job_for(model, str(i), prompt="a cat " * i, negative_prompt="red " * i, num_inference_steps=6)
        for i in range(1, 9)
    ]

    def cancel(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == 1:
            assert jobs[-1] in [active.job for active in engine._joiner.postponed]
            engine.cancel(jobs[-1].id)

    settings = settings_with(max_rows=2, prompt_cache_bytes=0)
    twin, _ = run_on_twin(model, jobs, settings, on_tick=cancel)
    assert isinstance(twin.events[jobs[-1].id], Cancelled)
    assert sum(isinstance(event, Finished) for event in twin.events.values()) == 7


def test_texts_that_come_and_go_leave_the_store_as_they_found_it(model: DiffusionModel) -> None:
    seen: list[Engine] = []
    jobs = [job_for(model, str(i), prompt="cat " * (i % 5), seed=i, num_inference_steps=1 + i % 3) for i in range(12)]
    run_on_twin(model, jobs, settings_with(max_rows=4), on_tick=lambda engine, *_: seen.append(engine))
    (cache,) = seen[0]._prompts.values()
    assert cache.store is not None
    assert cache._used == {}
    assert sorted([*cache._free, *(slot for entry in cache._idle.values() for slot in entry.slots)]) == list(
        range(len(cache.store))
    )
    assert seen[0]._lanes[next(iter(seen[0]._lanes))].pool.num_used == 0


def test_a_captured_row_that_turns_to_nan_fails_alone(model: DiffusionModel) -> None:
    # A huge guidance scale overflows fp32 in a few steps; the network itself is captured and stays as it is.
    jobs = [
        job_for(model, "good", num_inference_steps=12, seed=2),
        job_for(model, "bad", guidance_scale=1e36, num_inference_steps=12),
    ]
    settings = settings_with(**REPRODUCIBLE)
    twin, _ = run_on_twin(model, jobs, settings)
    bad = twin.events["bad"]
    assert isinstance(bad, Failed)
    assert bad.failure.code == "non_finite"
    assert twin.ticks[-1].num_rows == 1
    assert twin.images("good") == run_jobs(model, jobs[:1], settings).images("good")


@pytest.mark.parametrize("cancelling_step", range(1, 6))
def test_a_row_cancelled_while_a_tick_is_enqueued_leaves_no_trace_in_the_row_that_takes_its_slot(
    model: DiffusionModel, cancelling_step: int
) -> None:
    settings = settings_with(**REPRODUCIBLE)
    kept, dropped = job_for(model, "kept", seed=1, num_inference_steps=8), job_for(model, "dropped", **CROWD[3])
    heir = job_for(model, "heir", **CROWD[2])

    def swap(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == cancelling_step:
            engine.cancel("dropped")
            engine.submit(heir)

    twin, _ = run_on_twin(model, [kept, dropped], settings, expected=3, on_tick=swap)
    for job in (kept, heir):
        assert twin.images(job.id) == run_jobs(model, [job], settings).images(job.id)


def run_until_it_breaks(
    model: DiffusionModel, jobs: list[Job], device: TwinDevice, settings: Settings | None = None, **options: Any
) -> list[Event]:
    """Events of jobs until the engine gave up."""
    events: list[Event] = []
    settings = settings or settings_with()
    engine = Engine({model.id: model}, settings, on_event=events.append, device=device, **options)
    for job in jobs:
        engine.submit(job)
    with pytest.raises(DeviceLost, match="illegal memory access") as lost:
        engine.run()
    assert lost.value.job_ids == {job.id for job in jobs}
    return events


def test_a_lost_device_ends_the_engine_and_no_job_is_blamed(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker exits then, and hands its jobs back; those that were in the tick count it as a failure."""
    jobs = [job_for(model, "a"), job_for(model, "b", seed=2)]
    device = TwinDevice(has_graphs=False, fails=lambda n: LOST if n == 2 else None)
    assert run_until_it_breaks(model, jobs, device) == []

    calls = 0

    def lost(*_: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        raise LOST

    monkeypatch.setattr(model.unet, "forward", lost)
    assert run_until_it_breaks(model, jobs, TwinDevice(has_graphs=False)) == []
    assert calls == 1, "nothing is tried again on a lost device"


def test_a_device_lost_while_decoding_ends_the_engine_too(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> torch.Tensor:
        raise LOST

    monkeypatch.setattr(model.vae, "decode", lost)
    assert run_until_it_breaks(model, [job_for(model, "a")], TwinDevice(has_graphs=False)) == []


def test_a_device_lost_while_a_state_is_copied_is_more_than_a_copy_left_out(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> torch.Tensor:
        raise LOST

    monkeypatch.setattr(TwinDevice, "download", lost)
    settings = settings_with(checkpoint_steps=2)
    device = TwinDevice(has_graphs=False)
    assert run_until_it_breaks(model, [job_for(model, "a")], device, settings, on_saved=lambda _: None) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LOST, True),
        (NOT_PERMITTED, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("expected x, got y"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_of_cuda_is_told_from_others_and_from_a_lack_of_memory(error: Exception, expected: bool) -> None:
    assert comes_from_cuda(error) is expected


@pytest.mark.parametrize("answers", [True, False])
def test_a_device_that_still_answers_is_not_lost(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    asked: list[object] = []

    def synchronize(device: object) -> None:
        asked.append(device)
        if not answers:
            raise LOST

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    place = torch.device("cuda", 1)
    assert is_device_lost(NOT_PERMITTED, place) is not answers
    assert asked == [place]
    assert not is_device_lost(RuntimeError("expected x, got y"), place)
    assert asked == [place], "only what CUDA says is a reason to ask"


def test_a_capture_that_breaks_is_followed_by_captures_in_another_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[object] = []

    @contextmanager
    def graph(graph: object, *, pool: object, **_: object) -> Iterator[None]:
        pools.append(pool)
        yield

    def breaks() -> None:
        raise NOT_PERMITTED

    for name, stand_in in (("graph", graph), ("graph_pool_handle", object), ("Stream", Mock()), ("CUDAGraph", Mock())):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    device = CudaDevice(torch.device("cuda"), has_graphs=True)
    device.capture(lambda: None)
    with pytest.raises(RuntimeError, match="not permitted"):
        device.capture(breaks)
    device.capture(lambda: None)
    device.capture(lambda: None)
    first, broken, third, fourth = pools
    assert first is broken
    assert third is fourth
    assert third is not first


@pytest.mark.parametrize("is_reproducible", [True, False])
def test_cudnn_tries_algorithms_out_only_before_a_worker_is_ready(
    monkeypatch: pytest.MonkeyPatch, is_reproducible: bool
) -> None:
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    for name in ("Stream", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    device = CudaDevice(torch.device("cuda"), has_graphs=True)
    with device.activated(is_reproducible=is_reproducible):
        assert not torch.backends.cudnn.benchmark
        with device.trying_algorithms(is_reproducible=is_reproducible):
            assert torch.backends.cudnn.benchmark is not is_reproducible
        assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.deterministic is is_reproducible


def test_a_capture_that_cuda_refuses_is_logged_and_its_bucket_runs_call_by_call(model: DiffusionModel) -> None:
    class Refusing(TwinDevice):
        """Refuses the second capture, that of two model rows of 1, 2, 4."""

        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            replay = super().capture(work)
            if self.log.count("capture") == 2:
                raise NOT_PERMITTED
            return replay

    with capture_logs() as logs:
        twin, device = run_on_twin(model, [job_for(model, "two")], settings_with(max_rows=4), Refusing())
    assert twin.images("two")
    assert [entry["bucket"] for entry in logs if entry["event"] == "graph_not_captured"] == [2]
    assert device.log.count("capture") == 3
    assert device.log.count("replay") == 0


def test_a_failed_tick_on_the_device_changes_no_picture(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_with(**REPRODUCIBLE)
    jobs = [job_for(model, name, sampler="euler_a", seed=seed) for name, seed in (("a", 1), ("b", 2))]
    undisturbed = run_jobs(model, jobs, settings)
    step, calls = model.unet.forward, 0

    def fails_once(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no")
        return step(*arguments)

    monkeypatch.setattr(model.unet, "forward", fails_once)
    disturbed = run_jobs(model, jobs, settings, device=TwinDevice(has_graphs=False))
    assert [disturbed.images(name) for name in "ab"] == [undisturbed.images(name) for name in "ab"]


@pytest.mark.parametrize("has_graphs", [True, False], ids=["graphs", "call by call"])
@pytest.mark.parametrize(
    ("error", "code"),
    [(torch.OutOfMemoryError("no"), "out_of_memory"), (RuntimeError("no"), "job_failed")],
    ids=["no memory", "other"],
)
def test_a_tick_that_fails_after_its_step_fails_its_jobs_and_steps_no_row_twice(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, has_graphs: bool
) -> None:
    settings = settings_with(**REPRODUCIBLE)
    broken = [job_for(model, name, sampler="euler_a", seed=seed) for name, seed in (("a", 1), ("b", 2))]
    later = [job_for(model, name, sampler="euler_a", seed=seed) for name, seed in (("c", 3), ("d", 4))]
    undisturbed = run_jobs(model, later, settings)
    end_turn, engines, calls = Lane.end_turn, list[Engine](), 0

    def fails_once(lane: Lane) -> Any:
        nonlocal calls
        # What warms up has none.
        calls += bool(engines[0]._roster.is_open)
        if calls == 3:
            calls += 1
            for job in later:
                engines[0].submit(job)
            raise error
        return end_turn(lane)

    monkeypatch.setattr(Lane, "end_turn", fails_once)
    disturbed, _ = run_on_twin(
        model, broken, settings, TwinDevice(has_graphs=has_graphs), expected=4, on_start=engines.append
    )
    for job in broken:
        event = disturbed.events[job.id]
        assert isinstance(event, Failed)
        assert event.failure.code == code
    for job in later:
        assert disturbed.images(job.id) == undisturbed.images(job.id)
    assert calls == 4 + 4


def test_a_row_that_finds_no_memory_for_its_state_fails_alone(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = RowPool.take

    def refuse_wide(pool: RowPool, latents: torch.Tensor, *history: Any) -> Any:
        if latents.shape[-1] == 9:
            raise torch.OutOfMemoryError("no")
        return take(pool, latents, *history)

    monkeypatch.setattr(RowPool, "take", refuse_wide)
    outcome = run_jobs(model, [job_for(model, "wide", width=72), job_for(model, "own")], settings_with())
    assert outcome.images("own")
    wide = outcome.events["wide"]
    assert isinstance(wide, Failed)
    assert wide.failure.code == "out_of_memory"


def test_the_decoder_gets_latents_of_their_own_and_the_event_of_their_tick(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, seen = Decoder.submit, list[tuple[torch.Tensor, Any]]()

    def look(decoder: Decoder, row: Any, latents: torch.Tensor, ready: Any) -> None:
        seen.append((latents, ready))
        submit(decoder, row, latents, ready)

    monkeypatch.setattr(Decoder, "submit", look)
    engines: list[Engine] = []
    run_on_twin(model, [job_for(model, "a")], settings_with(), on_tick=lambda engine, *_: engines.append(engine))
    latents, ready = seen[-1]
    assert ready.is_complete
    (lane,) = engines[0]._lanes.values()
    assert latents.untyped_storage().data_ptr() != lane.pool.latents.untyped_storage().data_ptr()


def test_nobody_is_told_that_an_engine_is_ready_before_its_graphs_are(model: DiffusionModel) -> None:
    device, captured_when_ready = TwinDevice(), list[int]()

    def ready() -> None:
        captured_when_ready.append(device.log.count("capture"))
        engine.stop()

    events: list[Event] = []
    reports: list[TickReport] = []
    engine = Engine(
        {model.id: model},
        settings_with(max_rows=4),
        on_event=events.append,
        on_tick=reports.append,
        on_ready=ready,
        warm_up=True,
        device=device,
    )
    engine.run()
    assert captured_when_ready == [3]
    # The picture that warms up is nobody's.
    assert (events, reports) == ([], [])


def test_a_model_that_cannot_draw_never_gets_ready(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> torch.Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(model.vae, "decode", breaks)
    engine = Engine(
        {model.id: model}, settings_with(), on_event=lambda _: None, on_ready=lambda: pytest.fail("ready"), warm_up=True
    )
    with pytest.raises(Exception, match="internal error"):
        engine.run()


def test_an_engine_stops_while_it_captures(model: DiffusionModel) -> None:
    device = TwinDevice()
    capture: Callable[[Callable[[], None]], Callable[[], None]] = device.capture
    engine = Engine({model.id: model}, settings_with(), on_event=lambda _: None, warm_up=True, device=device)
    device.capture = lambda work: (engine.stop(), capture(work))[1]  # type: ignore[method-assign]
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert device.log.count("capture") == 1


def test_a_state_that_is_saved_while_ticks_are_ahead_is_that_of_its_own_step(model: DiffusionModel) -> None:
    """It is copied out in the order of the device's work, so the picture that goes on from it is the same."""
    settings = settings_with(**REPRODUCIBLE, checkpoint_interval_s=1e-6)
    job = job_for(model, "one", num_inference_steps=6, sampler="unipc")
    whole = run_jobs(model, [job], settings)
    states: dict[int, bytes] = {}

    def saved(one: Saved) -> None:
        states[one.checkpoint.num_done] = one.checkpoint.pack()

    run_on_twin(model, [job], settings, on_saved=saved)
    assert sorted(states) == [1, 2, 3, 4, 5]
    for num_done, state in states.items():
        rest, _ = run_on_twin(model, [job], settings, checkpoints={"one": {0: state}})
        assert len(rest.ticks) == 6 - num_done
        assert rest.images("one") == whole.images("one")
