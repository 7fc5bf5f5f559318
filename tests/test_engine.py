"""Step batching: what a row may and may not notice of its neighbours."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from darkroom.config import BUILTIN_MODEL, Settings, load_settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.diffusion.text import TextEmbedding
from darkroom.engine.device import TickDevice
from darkroom.engine.engine import Engine
from darkroom.engine.events import Cancelled, Expired, Failed, Finished, TickReport
from darkroom.engine.local import generate_images
from darkroom.engine.prompts import Prompt, PromptCache
from darkroom.engine.row import Row
from darkroom.jobs import Job, Priority
from darkroom.worker.main import load_models
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from tests.support.engines import job_for, pixels, request_for, run_jobs
from tests.support.metrics import Change
from tests.support.tiny_models import write_tiny_model
from tests.support.twin_device import TwinDevice

CROWD = [
    {"sampler": "ddim", "num_inference_steps": 3, "guidance_scale": 1.0, "seed": 1},
    {"sampler": "heun", "num_inference_steps": 3, "seed": 2, "negative_prompt": "a cat"},
    {"sampler": "euler_a", "num_inference_steps": 6, "seed": 3, "guidance_scale": 9.0},
    {"sampler": "dpmpp_2m_sde", "num_inference_steps": 5, "seed": 4, "prompt": "on the red"},
    {"sampler": "unipc", "num_inference_steps": 4, "seed": 5, "guidance_scale": 1.0},
    {"sampler": "dpmpp_2m", "num_inference_steps": 2, "seed": 6, "sigma_schedule": "karras"},
    {"sampler": "ddpm", "num_inference_steps": 4, "seed": 8},
]
FAST, REPRODUCIBLE = {"batching": "fast"}, {"batching": "reproducible", "reproducible_rows": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=3))
    torch.set_num_threads(threads)


def settings_with(**fields: object) -> Settings:
    return load_settings(num_threads=1, encode_threads=1, **fields)


@pytest.mark.parametrize("mode", [FAST, REPRODUCIBLE], ids=["fast", "reproducible"])
def test_every_picture_is_the_same_alone_and_in_a_mixed_crowd(model: DiffusionModel, mode: dict[str, object]) -> None:
    settings = settings_with(**mode)
    crowd = run_jobs(model, [job_for(model, str(i), **fields) for i, fields in enumerate(CROWD)], settings)
    assert max(tick.num_rows for tick in crowd.ticks) > 2
    for i, fields in enumerate(CROWD):
        alone = run_jobs(model, [job_for(model, "alone", **fields)], settings)
        if mode is REPRODUCIBLE:
            assert alone.images("alone") == crowd.images(str(i))
        else:
            assert np.abs(alone.pixels("alone") - crowd.pixels(str(i))).max() <= 1


def test_the_built_in_model_in_the_dtype_it_is_served_in_draws_the_same_alone_and_in_a_crowd() -> None:
    settings = settings_with()
    model = load_models(settings, [BUILTIN_MODEL])["emoji-world"]
    crowd = [{**fields, "prompt": "a duck in a forest", "num_inference_steps": 6} for fields in CROWD[:5]]
    together = run_jobs(model, [job_for(model, str(i), **fields) for i, fields in enumerate(crowd)], settings)
    for i, fields in enumerate(crowd):
        alone = run_jobs(model, [job_for(model, "alone", **fields)], settings)
        assert np.abs(alone.pixels("alone") - together.pixels(str(i))).max() <= 1


@pytest.mark.parametrize("joining_step", range(1, 6))
@pytest.mark.parametrize("mode", [FAST, REPRODUCIBLE], ids=["fast", "reproducible"])
def test_a_row_may_join_and_leave_at_any_step_of_another(
    model: DiffusionModel, mode: dict[str, object], joining_step: int
) -> None:
    settings = settings_with(**mode)
    host, guest = job_for(model, "host", num_inference_steps=6, seed=1), job_for(model, "guest", **CROWD[1])

    def join(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == joining_step:
            engine.submit(guest)

    together = run_jobs(model, [host], settings, expected=2, on_tick=join)
    assert together.ticks[joining_step].joined == 1
    for job in (host, guest):
        alone = run_jobs(model, [job], settings).images(job.id)
        if mode is REPRODUCIBLE:
            assert alone == together.images(job.id)
        else:
            assert np.abs(pixels(alone[0]) - together.pixels(job.id)).max() <= 1


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(model: DiffusionModel) -> None:
    settings = settings_with()
    first, again, other = (generate_images(model, request_for(model, seed=seed), settings)[0] for seed in (7, 7, 8))
    assert first == again
    assert np.abs(pixels(first[0]) - pixels(other[0])).max() > 8


def test_image_i_of_a_request_is_the_picture_of_seed_plus_i(model: DiffusionModel) -> None:
    settings = settings_with(**REPRODUCIBLE)
    three = run_jobs(model, [job_for(model, "three", num_images_per_prompt=3, seed=40)], settings)
    for i in range(3):
        single = run_jobs(model, [job_for(model, "single", seed=40 + i)], settings)
        assert np.array_equal(single.pixels("single"), three.pixels("three", i))


def test_a_row_without_guidance_costs_one_model_row_and_a_guided_row_two(model: DiffusionModel) -> None:
    jobs = [job_for(model, "guided"), job_for(model, "plain", guidance_scale=1.0)]
    ticks = run_jobs(model, jobs, settings_with()).ticks
    assert {tick.choice.model_rows for tick in ticks} == {3}


def test_reproducible_mode_always_computes_its_one_bucket(model: DiffusionModel) -> None:
    ticks = run_jobs(model, [job_for(model, "alone")], settings_with(**REPRODUCIBLE)).ticks
    assert {tick.choice.bucket for tick in ticks} == {6}


def test_rows_of_two_sizes_take_turns(model: DiffusionModel) -> None:
    jobs = [
        job_for(model, "small", num_inference_steps=10),
        job_for(model, "wide", num_inference_steps=10, width=72, height=40),
    ]
    outcome = run_jobs(model, jobs, settings_with())
    assert outcome.pixels("wide").shape == (40, 72, 3)
    first_half = [tick.progress[0][0].id for tick in outcome.ticks[:8]]
    assert set(first_half) == {"small", "wide"}


def test_a_cancelled_row_is_gone_at_the_next_tick_and_its_neighbours_do_not_notice(model: DiffusionModel) -> None:
    settings = settings_with(**REPRODUCIBLE)
    jobs = [job_for(model, "kept", seed=1, num_inference_steps=6), job_for(model, "dropped", num_inference_steps=6)]

    def cancel(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == 2:
            engine.cancel("dropped")
            engine.cancel("unknown")

    outcome = run_jobs(model, jobs, settings, on_tick=cancel)
    assert isinstance(outcome.events["dropped"], Cancelled)
    assert [tick.num_rows for tick in outcome.ticks] == [2, 2, 1, 1, 1, 1]
    assert outcome.images("kept") == run_jobs(model, jobs[:1], settings).images("kept")


@pytest.mark.parametrize("at_tick", range(7))
def test_a_job_cancelled_at_any_step_leaves_its_batch_mates_pictures_bit_equal(
    model: DiffusionModel, at_tick: int
) -> None:
    settings = settings_with(**REPRODUCIBLE)
    mates = [job_for(model, "ddim", **CROWD[0]), job_for(model, "euler_a", **{**CROWD[2], "num_inference_steps": 8})]
    dropped = job_for(model, "dropped", num_inference_steps=7, num_images_per_prompt=2, guidance_scale=1.0)

    def cancel(engine: Engine, _: TickReport | None, ticks: int) -> None:
        if ticks == at_tick:
            engine.cancel("dropped")

    if at_tick == 0:
        outcome = run_jobs(model, [*mates, dropped], settings, on_start=lambda engine: cancel(engine, None, 0))
    else:
        outcome = run_jobs(model, [*mates, dropped], settings, on_tick=cancel)
    assert isinstance(outcome.events["dropped"], Cancelled)
    together = [any(job.id == "dropped" for job, *_ in tick.progress) for tick in outcome.ticks]
    assert together == [tick < at_tick for tick in range(len(together))]
    for job in mates:
        assert outcome.images(job.id) == run_jobs(model, [job], settings).images(job.id)


def test_an_urgent_job_takes_the_next_tick_and_the_parked_row_finishes_unchanged(model: DiffusionModel) -> None:
    settings = settings_with(max_rows=2)
    patient = job_for(model, "patient", Priority.LOW, num_inference_steps=6)
    urgent = job_for(model, "urgent", Priority.HIGH, num_inference_steps=2)

    def arrive(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == 2:
            engine.submit(urgent)

    outcome = run_jobs(model, [patient], settings, expected=2, on_tick=arrive)
    order = [tick.progress[0][0].id for tick in outcome.ticks]
    assert order == ["patient"] * 2 + ["urgent"] * 2 + ["patient"] * 4
    assert outcome.images("patient") == run_jobs(model, [patient], settings).images("patient")


def test_a_request_that_breaks_the_tick_fails_and_its_batch_mates_finish(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = model.unet.forward, 0

    def breaks(x: torch.Tensor, *rest: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 or (calls > 3 and x.shape[0] == 1):
            raise RuntimeError("secret path /etc/passwd")
        return step(x, *rest)

    monkeypatch.setattr(model.unet, "forward", breaks)
    jobs = [job_for(model, "good"), job_for(model, "bad", guidance_scale=1.0)]
    outcome = run_jobs(model, jobs, settings_with())
    assert outcome.images("good")
    bad = outcome.events["bad"]
    assert isinstance(bad, Failed)
    assert "secret" not in bad.failure.message


def test_a_failed_tick_changes_no_picture_not_even_with_noise_in_every_step(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    disturbed = run_jobs(model, jobs, settings)
    assert [disturbed.images(name) for name in "ab"] == [undisturbed.images(name) for name in "ab"]


def test_rows_that_find_no_memory_together_lose_no_step_and_come_fewer_from_then_on(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job_for(model, str(seed), seed=seed, guidance_scale=1.0, num_inference_steps=5) for seed in range(4)]
    undisturbed = run_jobs(model, jobs, settings_with())
    step, refused, done = model.unet.forward, list[int](), list[int]()

    def small_device(x: torch.Tensor, *rest: object) -> torch.Tensor:
        if x.shape[0] > 2:
            refused.append(x.shape[0])
            raise torch.OutOfMemoryError("no")
        done.append(x.shape[0])
        return step(x, *rest)

    monkeypatch.setattr(model.unet, "forward", small_device)
    change = Change()
    outcome = run_jobs(model, jobs, settings_with())
    for job in jobs:
        assert np.abs(outcome.pixels(job.id) - undisturbed.pixels(job.id)).max() <= 1
    assert refused == [4]
    assert done[:4] == [1] * 4, "those of the failed tick take their step one by one"
    assert set(done[4:]) == {2}, "and share later ticks within the limit that was learned"
    assert sum(done) == 4 * 5
    assert change("out_of_memory_total", where="tick") == 1


@pytest.mark.parametrize(("num_refused", "succeeds"), [(1, True), (2, False)])
def test_a_row_alone_that_finds_no_memory_is_tried_once_more(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, num_refused: int, succeeds: bool
) -> None:
    step, calls = model.unet.forward, 0

    def refuses(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls <= num_refused:
            raise torch.OutOfMemoryError("no")
        return step(*arguments)

    monkeypatch.setattr(model.unet, "forward", refuses)
    event = run_jobs(model, [job_for(model, "one")], settings_with()).events["one"]
    assert isinstance(event, Finished if succeeds else Failed)


@pytest.mark.parametrize("copied", ["checkpoint", "preview"])
@pytest.mark.parametrize("device", [TickDevice, TwinDevice], ids=["cpu", "ticks ahead"])
def test_a_copy_that_finds_no_memory_is_left_out_and_costs_no_picture(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, device: type[TickDevice], copied: str
) -> None:
    """The tick counted as failed and was run again, on latents that it had advanced already: another picture."""
    job = job_for(model, "one", num_inference_steps=7)
    due = {"checkpoint_steps": 2, "checkpoint_interval_s": 0.0, "preview_steps": 2}
    settings = settings_with(**REPRODUCIBLE, **due)
    undisturbed = run_jobs(model, [job], settings)
    download, calls, saved, shown = device.download, 0, list[int](), list[int]()

    def refuses_the_second(self: TickDevice, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no")
        return download(self, tensor)

    def note(_previews: object, _row: object, _latents: object, step: int) -> None:
        shown.append(step)

    monkeypatch.setattr(device, "download", refuses_the_second)
    monkeypatch.setattr("darkroom.engine.previews.Previews.show", note)
    options: dict[str, Any] = {"on_saved": lambda one: saved.append(one.checkpoint.num_done)}
    if copied == "preview":
        options = {"on_preview": lambda _: None, "on_start": lambda engine: engine.show("one", 0, "linear")}
    place = TickDevice(torch.device("cpu")) if device is TickDevice else TwinDevice(has_graphs=False)
    with capture_logs() as logs:
        # Seconds pass whenever it is read, so that previews are due by their steps.
        disturbed = run_jobs(model, [job], settings, device=place, clock=itertools.count(0.0).__next__, **options)
    assert disturbed.images("one") == undisturbed.images("one")
    assert [entry["event"] for entry in logs if entry["log_level"] != "info"] == [f"no_{copied}"]
    # A checkpoint takes two calls, a preview one.
    assert (saved, shown) == (([4, 6], []) if copied == "checkpoint" else ([], [1, 5]))


def test_pictures_that_cannot_be_decoded_together_are_decoded_one_by_one(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = model.vae.decode

    def small_device(latents: torch.Tensor) -> torch.Tensor:
        if latents.shape[0] > 1:
            raise torch.OutOfMemoryError("no")
        return decode(latents)

    monkeypatch.setattr(model.vae, "decode", small_device)
    outcome = run_jobs(model, [job_for(model, "four", num_images_per_prompt=4)], settings_with())
    assert len(outcome.images("four")) == 4


class Attempt:
    """Stands for the tensors of a call: fails with several rows, and remembers itself only weakly."""

    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        self.call = call
        self.held: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
        assert all(held() is None for held in self.held), "a failed attempt still holds its memory"
        if x.shape[0] > 1:
            activations = torch.zeros(64)
            self.held.append(weakref.ref(activations))
            try:
                raise ValueError("the cause")
            except ValueError as error:
                raise torch.OutOfMemoryError("no") from error
        return self.call(x, *rest)


def test_nothing_of_a_job_that_has_ended_waits_for_the_garbage_collector(model: DiffusionModel) -> None:
    """Jobs and rows referred to each other: latents and pictures stayed until a collection of everything, which comes
    after thousands of jobs."""
    rows: dict[str, list[weakref.ref[Row]]] = {}

    def note(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == 1:
            for row in engine._rows.values():
                rows.setdefault(row.active.job.id, []).append(weakref.ref(row))
            engine.cancel("cancelled")

    names = ("cancelled", "whole")
    jobs = [job_for(model, name, num_images_per_prompt=2, guidance_scale=1.0) for name in names]
    jobs.append(job_for(model, "long", num_inference_steps=40, guidance_scale=1.0))
    gc.disable()
    try:
        outcome = run_jobs(model, jobs, settings_with(), on_tick=note)
        # The rows of the last tick stay until another takes its place.
        alive = {job_id: sum(row() is not None for row in refs) for job_id, refs in rows.items()}
    finally:
        gc.enable()
    assert outcome.ticks[-1].num_rows == 1
    assert alive == {"cancelled": 0, "whole": 0, "long": 1}
    assert isinstance(outcome.events["cancelled"], Cancelled)
    assert len(outcome.images("whole")) == 2


def test_nothing_of_a_failed_tick_is_alive_when_its_rows_are_tried_alone(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(model.unet.forward)
    monkeypatch.setattr(model.unet, "forward", attempt)
    jobs = [job_for(model, name, guidance_scale=1.0) for name in "ab"]
    outcome = run_jobs(model, jobs, settings_with())
    assert attempt.held
    assert all(outcome.images(name) for name in "ab")


def test_nothing_of_a_failed_decoding_is_alive_when_its_pictures_are_tried_alone(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(model.vae.decode)
    monkeypatch.setattr(model.vae, "decode", attempt)
    outcome = run_jobs(model, [job_for(model, "four", num_images_per_prompt=4)], settings_with())
    assert attempt.held
    assert len(outcome.images("four")) == 4


@pytest.mark.parametrize("failing", ["clone", "copy"])
def test_an_encoding_that_fails_half_way_leaves_the_store_as_it_was(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    prompts = [Prompt(text, 0, False) for text in ("a", "b", "c")]
    cache = PromptCache(model, 0, batch_alone=False, num_in_use=3)
    calls = 0

    class Failing(torch.Tensor):
        """Finds no memory for its second clone or copy."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            if func is (torch.Tensor.clone if failing == "clone" else torch.Tensor.copy_):
                calls += 1
                if calls == 2:
                    raise torch.OutOfMemoryError("no")
            return super().__torch_function__(func, types, args, kwargs or {})

    encode = type(model.text).encode

    def with_pooled(*arguments: Any, **options: Any) -> list[TextEmbedding]:
        found = encode(*arguments, **options)
        return [TextEmbedding(one.prompt_embeds, torch.zeros(4).as_subclass(Failing)) for one in found]

    assert cache.store is not None
    store = cache.store
    with monkeypatch.context() as patch:
        patch.setattr(type(model.text), "encode", with_pooled)
        cache.store = store.as_subclass(Failing)
        with pytest.raises(torch.OutOfMemoryError):
            cache.encode(prompts)
        cache.store = store
    assert calls == 2
    assert (cache._used, sorted(cache._free)) == ({}, [0, 1, 2])
    assert len({encoded.slots for encoded in cache.encode(prompts).values()}) == 3


def test_only_the_ticks_have_several_cpu_threads(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch once gave the decoder's thread a team as well, and each tick after the first picture took twice as long."""
    decode, step, seen = model.vae.decode, model.unet.forward, {}
    monkeypatch.setattr(model.vae, "decode", lambda x: (seen.update(decode=torch.get_num_threads()), decode(x))[1])
    monkeypatch.setattr(model.unet, "forward", lambda *a: (seen.update(tick=torch.get_num_threads()), step(*a))[1])
    run_jobs(model, [job_for(model, "a"), job_for(model, "b", seed=2)], load_settings(num_threads=2))
    assert seen == {"decode": 1, "tick": 2}


def test_a_prompt_that_cannot_be_encoded_fails_its_own_job_only(model: DiffusionModel) -> None:
    jobs = [job_for(model, "good"), job_for(model, "bad", clip_skip=99), job_for(model, "fine", prompt="a red cat")]
    outcome = run_jobs(model, jobs, settings_with())
    assert outcome.images("good")
    assert outcome.images("fine")
    assert isinstance(outcome.events["bad"], Failed)


def test_a_job_past_its_deadline_costs_no_further_tick(model: DiffusionModel) -> None:
    outcome = run_jobs(model, [job_for(model, "late", num_inference_steps=500)], settings_with(), deadline_in_s=0.05)
    assert isinstance(outcome.events["late"], Expired)
    assert len(outcome.ticks) < 500


def test_an_autoencoder_that_overflows_in_fp16_is_replaced_and_the_picture_decoded_again(tmp_path: Path) -> None:
    """Its first convolution gives values beyond 65504, which the norm behind it takes back to size."""
    directory = write_tiny_model(tmp_path / "model", "sd1", seed=3)
    file = directory / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.weight"] *= 1e5
    save_file(weights, file)
    exact, overflowing = load_model(directory), load_model(directory, vae_dtype=torch.float16)
    jobs = [job_for(exact, "two", num_images_per_prompt=2)]
    expected = run_jobs(exact, jobs, settings_with())
    with capture_logs() as logs:
        got = run_jobs(overflowing, jobs, settings_with())
    assert got.images("two") == expected.images("two")
    assert overflowing.vae.dtype is torch.float32
    assert [entry["log_level"] for entry in logs if entry["event"] == "vae_overflows"] == ["warning"]


def test_a_cancellation_of_an_earlier_attempt_leaves_the_present_one_alone(model: DiffusionModel) -> None:
    def cancel_old(engine: Engine, _: TickReport, ticks: int) -> None:
        engine.cancel("job", attempt=6)

    job = msgspec.structs.replace(job_for(model, "job"), attempt=7)
    assert run_jobs(model, [job], settings_with(), on_tick=cancel_old).images("job")


def test_a_failing_image_fails_its_whole_job_once(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = model.vae.decode, 0

    def breaks(latents: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls >= 2:
            raise RuntimeError("no")
        return decode(latents)

    monkeypatch.setattr(model.vae, "decode", breaks)
    jobs = [job_for(model, "three", num_images_per_prompt=3)]
    outcome = run_jobs(model, jobs, settings_with(batching="reproducible", reproducible_rows=8))
    assert isinstance(outcome.events["three"], Failed)


def test_a_job_for_a_model_that_is_not_here_is_refused_at_the_door(model: DiffusionModel) -> None:
    engine = Engine({model.id: model}, settings_with(), on_event=lambda _: None)
    with pytest.raises(ValueError, match="model: got 'other'"):
        engine.submit(Job(id="x", request=msgspec.structs.replace(request_for(model), model="other")))
    engine.stop()
    engine.run()


def test_progress_counts_evaluations_of_the_slowest_image(model: DiffusionModel) -> None:
    seen: list[tuple[int, int]] = []
    request = request_for(model, sampler="heun", num_inference_steps=3, num_images_per_prompt=2)
    generate_images(model, request, settings_with(), lambda step, num_steps: seen.append((step, num_steps)))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_the_manifest_says_what_happened(model: DiffusionModel) -> None:
    images, result = generate_images(model, request_for(model, num_images_per_prompt=2, seed=5), settings_with())
    assert [(image.index, image.seed, image.num_bytes) for image in result.images] == [
        (0, 5, len(images[0])),
        (1, 6, len(images[1])),
    ]
    assert result.weights_hash == model.card.weights_hash
    assert result.max_batch_rows == 4
    assert result.timings.denoise_s > 0


def looked_up(change: Change) -> tuple[float, float]:
    """Hits and misses of the prompt cache since `change` was made."""
    hits, misses = (change("prompt_cache_requests_total", outcome=outcome) for outcome in ("hit", "miss"))
    return hits, misses


def test_prompts_are_encoded_once_and_the_cache_stays_within_its_bytes(model: DiffusionModel) -> None:
    prompts = [Prompt(text, 0, False) for text in ("a", "b", "c", "a")]
    size = PromptCache(model, 1 << 30, batch_alone=False).encode(prompts[:1])[prompts[0]].num_bytes
    cache = PromptCache(model, 2 * size, batch_alone=False)
    change = Change()
    in_use = cache.encode(prompts)
    assert looked_up(change) == (0, 3)
    assert cache.encode([prompts[0]])[prompts[0]] is in_use[prompts[0]]
    cache.release([in_use[prompts[0]]])
    # What is in use is never dropped; of what is not, the two that were released last are kept.
    for prompt in prompts[:3]:
        cache.release([in_use[prompt]])
    cache.release(cache.encode([prompts[2]]).values())
    assert looked_up(change) == (2, 3)
    cache.encode([prompts[0]])
    assert looked_up(change)[1] == 4
