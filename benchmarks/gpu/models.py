"""Whole models with random weights at their true sizes: Darkroom's engine against diffusers, eager and compiled.

A closed batch is n requests at once, timed from the first to the last picture's bytes, prompts encoded anew each time.
Sustained is the rate while n pictures are in the ticks at any time and others are decoded beside them.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from darkroom.config import Settings
from darkroom.diffusion.compiled import CompiledGraphs
from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.memory import Needed, measure
from darkroom.engine.batcher import Batcher
from darkroom.jobs import GenerationRequest
from darkroom.worker.compile import prepare_compile
from darkroom.worker.main import choose_dtype, load_models
from darkroom_kernels.bench.timing import Limits, measure_limits, time_calls, time_replays

from benchmarks.families import Family, write_model
from benchmarks.gpu.op_classes import seconds_by_class
from benchmarks.gpu.pipelines import Pipeline
from benchmarks.gpu.running import Run, RunningEngine
from benchmarks.gpu.sections import Item, Measured, NotYet, table
from benchmarks.quality import compare, draw, exact_fp32, plainest
from benchmarks.record import Figure

BATCHES = (1, 8, 4, 16, 32)
COMPILED_BATCHES = (1, 8)
BREAKDOWN_BATCHES = (1, 8)
GUIDANCE_SCALE = 5.0
NUM_SEEDS = 20
# Pictures that share a decoder call here; the engine takes as many where they are small.
DECODE_BATCH = 4
OURS, OURS_COMPILED = "darkroom", "darkroom compiled"
EAGER, COMPILED = "diffusers eager", "diffusers compiled"


@dataclass(frozen=True)
class Plan:
    """How much to measure. `num_seeds` pictures of `quality_steps` steps are compared with fp32; 0 compares none."""

    families: tuple[Family, ...]
    batches: tuple[int, ...] = BATCHES
    compiled_batches: tuple[int, ...] = COMPILED_BATCHES
    breakdown_batches: tuple[int, ...] = BREAKDOWN_BATCHES
    num_steps: int = 20
    num_seeds: int = NUM_SEEDS
    quality_steps: int = 5
    compile_mode: str = "reduce-overhead"
    rounds: int = 2


class ModelsSection:
    """Checkpoints are written below `directory`, and stay there for the next run."""

    name = "models"

    def __init__(self, plan: Plan, settings: Settings, device: torch.device, directory: Path) -> None:
        self.plan, self.device, self.directory = plan, device, directory
        most_rows = 2 * max(plan.batches)
        self.settings = settings.model_copy(
            update={"max_rows": most_rows, "encode_threads": min(16, os.cpu_count() or 1), "device": str(device)}
        )
        self.dtype = choose_dtype(settings.dtype, device)
        self._held: tuple[tuple[Any, ...], Any] | None = None
        self._prompts = (f"a picture, number {number}" for number in itertools.count())
        self._found: dict[str, dict[str, Any]] = {}
        self._computed: dict[str, float] = {}

    def resume(self, found: dict[str, dict[str, Any]]) -> None:
        self._found = dict(found)

    def close(self) -> None:
        held = () if self._held is None else self._held[1] if isinstance(self._held[1], tuple) else (self._held[1],)
        for part in held:
            if isinstance(part, RunningEngine):
                part.close()
        del held
        self._held = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def items(self) -> Iterable[Item]:
        plan = self.plan
        yield Item("limits", self._keeping("limits", self._measure_limits), expected_s=10.0)
        for family in plan.families:
            floor_s = family.image_flops(plan.num_steps) / 400e12

            def item(name: str, measure: Callable[[], Measured], expected_s: float, family: Family = family) -> Item:
                full = f"{family.name} {name}"
                return Item(full, self._keeping(full, measure), expected_s)

            if plan.num_seeds:
                yield item("quality", lambda f=family: self._measure_quality(f), 20 + 150 * floor_s)
            for count in plan.batches:
                yield item(
                    f"{OURS} {count}", lambda f=family, n=count: self._measure_ours(f, n), 20 + 8 * count * floor_s
                )
            for count in plan.breakdown_batches:
                yield item(f"breakdown {count}", lambda f=family, n=count: self._measure_breakdown(f, n), 15)
            for count in plan.compiled_batches:
                yield item(
                    f"{OURS_COMPILED} {count}",
                    lambda f=family, n=count: self._measure_compiled(f, n),
                    240 + 8 * count * floor_s,
                )
            for mode, counts in ((None, plan.batches), (plan.compile_mode, plan.compiled_batches)):
                side = COMPILED if mode else EAGER
                for count in counts:
                    yield item(
                        f"{side} {count}",
                        lambda f=family, n=count, m=mode: self._measure_peer(f, n, m),
                        (120 if mode else 10) + 8 * count * floor_s,
                    )

    def _keeping(self, name: str, measure: Callable[[], Measured]) -> Callable[[], Measured]:
        """What later items need of earlier ones: the limits, the quality, the latencies."""

        def keep() -> Measured:
            measured = measure()
            self._found[name] = measured.data
            return measured

        return keep

    def _hold(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """One model on the device at a time: the last one goes before the next comes."""
        if self._held is None or self._held[0] != key:
            self.close()
            self._held = key, make()
        return self._held[1]

    def _model(self, family: Family, settings: Settings) -> DiffusionModel:
        path = write_model(family, self.directory, self.device)
        return next(iter(load_models(settings, [path]).values()))

    def _engine(self, family: Family) -> RunningEngine:
        def make() -> RunningEngine:
            return RunningEngine(self._model(family, self.settings), self.settings)

        engine: RunningEngine = self._hold((OURS, family.name), make)
        return engine

    def _requests(self, model: DiffusionModel, count: int, num_steps: int) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                prompt=next(self._prompts),
                model=model.id,
                width=model.card.width,
                height=model.card.height,
                num_inference_steps=num_steps,
                guidance_scale=GUIDANCE_SCALE,
                seed=seed,
                sampler="euler",
                sigma_schedule="simple",
                # diffusers gives pixels; JPEG is the nearest to that which a worker gives.
                output_format="jpeg",
            )
            for seed in range(count)
        ]

    def _measure_limits(self) -> Measured:
        limits = measure_limits(self.device, self.dtype)
        name = str(self.dtype).removeprefix("torch.")
        return Measured(
            [
                Figure(f"limit, large {name} product", limits.flops / 1e12, "TFLOP/s"),
                Figure("limit, large copy", limits.bytes_per_s / 1e12, "TB/s"),
            ],
            {"flops": limits.flops, "bytes_per_s": limits.bytes_per_s},
        )

    def _limits(self) -> Limits:
        if "limits" not in self._found:
            self._found["limits"] = self._measure_limits().data
        return Limits(**self._found["limits"])

    def _measure_quality(self, family: Family) -> Measured:
        plan = self.plan
        self.close()
        seeds = range(plan.num_seeds)
        plain = plainest(self.settings)
        with exact_fp32():
            expected, _ = draw(self._model(family, plain), plain, plan.quality_steps, seeds)
        gc.collect()
        ours, _ = draw(self._model(family, self.settings), self.settings, plan.quality_steps, seeds)
        return Measured([], {"quality": f"{compare(ours, expected)}, {plan.quality_steps} steps"})

    def _quality(self, family: Family) -> str:
        return str(self._found.get(f"{family.name} quality", {}).get("quality", "not measured"))

    def _measure_ours(self, family: Family, count: int) -> Measured:
        plan, running = self.plan, self._engine(family)
        model = running.model
        running.use(Batcher([bucket for bucket in running.buckets if bucket <= 2 * count]))
        running.draw(self._requests(model, count, 2))
        self._reset_peak()
        runs = [running.draw(self._requests(model, count, plan.num_steps)) for _ in range(plan.rounds)]
        seconds = statistics.median(run.last_s for run in runs)
        peak_gib = self._peak_gib()
        waiting = max(2 * count, min(8, 8 * count))
        sustained = waiting / running.draw(self._requests(model, waiting, plan.num_steps)).last_s
        data = self._data(family, OURS, count, seconds) | {
            "sustained": sustained,
            "peak_gib": peak_gib,
            "computed_gib": self._computed_gib(family, model),
            "tick_s": steady_tick_s(runs),
            "decode_s": statistics.median(timings.decode_s for run in runs for timings in run.timings),
        }
        detail = f"{data['share']:.3f} of the floor's rate, sustained {sustained:.4g} images/s"
        if peak_gib is not None:
            detail += f", {peak_gib:.2f} GiB reserved at most, {data['computed_gib']:.2f} computed"
        return Measured(self._figures(family, OURS, count, seconds, self._quality(family), detail), data)

    def _measure_compiled(self, family: Family, count: int) -> Measured:
        """With `DARKROOM_COMPILE=on`, as a worker starts with it, and one bucket: each takes the compiler minutes."""
        plan = self.plan
        settings = self.settings.model_copy(update={"compile": "on", "max_rows": 2 * count})

        def make() -> tuple[RunningEngine, CompiledGraphs]:
            model = self._model(family, settings)
            close = prepare_compile([model], settings)
            running = RunningEngine(model, settings, [2 * count])
            close()
            assert isinstance(model.unet.compiled, CompiledGraphs)
            return running, model.unet.compiled

        running, graphs = self._hold((OURS_COMPILED, family.name, count), make)
        running.draw(self._requests(running.model, count, 2))
        self._reset_peak()
        runs = [running.draw(self._requests(running.model, count, plan.num_steps)) for _ in range(plan.rounds)]
        seconds = statistics.median(run.last_s for run in runs)
        data = self._data(family, OURS_COMPILED, count, seconds) | {"peak_gib": self._peak_gib()}
        trials = [
            f"bucket {trial.rows}: compiled in {trial.seconds:.0f} s, {trial.speedup:.3f}x the hand-made UNet, "
            f"largest difference {trial.difference:.1e}, {'used' if trial.is_used else 'not used'}"
            for trial in graphs.trials
        ]
        detail = ", ".join([f"{data['share']:.3f} of the floor's rate", *(trials or ["nothing was compiled"])])
        return Measured(self._figures(family, OURS_COMPILED, count, seconds, "", detail), data)

    def _measure_peer(self, family: Family, count: int, compile_mode: str | None) -> Measured:
        plan, side = self.plan, COMPILED if compile_mode else EAGER
        path = write_model(family, self.directory, self.device)
        pipeline: Pipeline = self._hold(
            (side, family.name), lambda: Pipeline(path, self.device, self.dtype, compile_mode=compile_mode)
        )

        def run(num_steps: int) -> float:
            prompts = [next(self._prompts) for _ in range(count)]
            return pipeline.draw(prompts, side_px=family.side_px, num_steps=num_steps, guidance_scale=GUIDANCE_SCALE)

        first_s = run(2)
        if compile_mode:
            # Graphs are recorded in the second and third call.
            run(3)
        self._reset_peak()
        seconds = statistics.median(run(plan.num_steps) for _ in range(plan.rounds))
        data = self._data(family, side, count, seconds) | {"peak_gib": self._peak_gib()}
        how = f"{compile_mode}, channels-last, fused QKV, first call {first_s:.0f} s, " if compile_mode else ""
        detail = f"diffusers {pipeline.version}, {how}{data['share']:.3f} of the floor's rate"
        return Measured(self._figures(family, side, count, seconds, "", detail), data)

    def _data(self, family: Family, side: str, count: int, seconds: float) -> dict[str, Any]:
        floor_s = count * family.image_flops(self.plan.num_steps) / self._limits().flops
        return {"family": family.name, "side": side, "count": count, "seconds": seconds, "share": floor_s / seconds}

    def _figures(
        self, family: Family, side: str, count: int, seconds: float, quality: str, detail: str
    ) -> list[Figure]:
        name = f"models, {family.name}, {self.plan.num_steps} steps, {self._dtype_name()}, batch {count}, {side}"
        figures = [
            Figure(f"{name}, latency", seconds, "s", quality, detail),
            Figure(f"{name}, rate", count / seconds, "images/s", quality, detail),
        ]
        ours = self._found.get(f"{family.name} {OURS} {count}")
        if side != OURS and ours is not None:
            figures.append(Figure(f"{name}: darkroom is as fast as", seconds / ours["seconds"], "x", "", "same run"))
        return figures

    def _dtype_name(self) -> str:
        return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]

    def _measure_breakdown(self, family: Family, count: int) -> Measured:
        """UNet and decoder alone on the device, the rest as what is left of the closed batch's latency."""
        running = self._engine(family)
        model = running.model
        ours = self._found.get(f"{family.name} {OURS} {count}")
        if ours is None:
            raise NotYet(f"batch {count} of {family.name}, whose latency this breaks down, is not measured")
        call = unet_call(model, 2 * count)
        unet_s = time_calls([call], self.device, budget_s=1.0).seconds
        classes = seconds_by_class(call, self.device)
        chunk = min(count, DECODE_BATCH)
        side = family.side_px // model.vae_scale_factor
        latents = torch.randn(chunk, model.latent_channels, side, side, device=self.device)
        vae_s = time_calls([lambda: model.vae.decode(latents)], self.device, budget_s=1.0).seconds * count / chunk
        parts = {"unet_s": self.plan.num_steps * unet_s, "vae_s": vae_s}
        rest_s = ours["seconds"] - sum(parts.values())
        graph = running.graph_of(2 * count)
        graph_s = unet_s if graph is None else time_replays(graph, self.device)
        beside = (ours["tick_s"] - graph_s) / ours["tick_s"]
        what = "the UNet" if graph is None else "its graph"
        name = f"models, {family.name}, {self._dtype_name()}, batch {count}"
        detail = ", ".join(f"{label} {seconds * 1e3:.3g} ms" for label, seconds in classes.items())
        figures = [
            Figure(f"{name}, one UNet call", unet_s * 1e3, "ms", "", detail),
            Figure(f"{name}, decoder", vae_s * 1e3, "ms"),
            Figure(f"{name}, rest of the latency", rest_s * 1e3, "ms"),
            Figure(f"{name}, share of a tick outside {what}", beside, "1"),
        ]
        data = {
            "family": family.name,
            "count": count,
            **parts,
            "rest_s": rest_s,
            "tick_s": ours["tick_s"],
            "unet_call_s": unet_s,
            "graph_s": graph_s,
            "beside": beside,
            "beside_what": what,
            "classes": classes,
        }
        return Measured(figures, data)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _computed_gib(self, family: Family, model: DiffusionModel) -> float:
        """What the check at a worker's start reckons for this model at these settings, whatever the batch."""
        if family.name not in self._computed:
            texts = [
                ("CLIPTextModelWithProjection" if i else "CLIPTextModel", text) for i, text in enumerate(family.text)
            ]
            memory = measure(
                family.name,
                family.unet,
                family.vae,
                texts,
                [(family.side_px, family.side_px)],
                dtype=self.dtype,
                vae_dtype=model.vae.dtype,
                vae_tile_px=self.settings.vae_tile_px,
                kernels=self.settings.kernels,
            )
            needed = Needed.by([memory], self.settings.prompt_cache_bytes)
            self._computed[family.name] = needed.total(self.settings.max_rows) / 2**30
        return self._computed[family.name]

    def _peak_gib(self) -> float | None:
        return torch.cuda.max_memory_reserved(self.device) / 2**30 if self.device.type == "cuda" else None

    def report(self, found: dict[str, dict[str, Any]], reasons: dict[str, str]) -> str:
        lines = []
        if "limits" in found:
            limits = found["limits"]
            lines.append(f"limits: {limits['flops'] / 1e12:.4g} TFLOP/s, {limits['bytes_per_s'] / 1e12:.4g} TB/s")
        lines += [f"{name}: {data['quality']}" for name, data in found.items() if name.endswith(" quality")]
        rows: list[tuple[str, ...]] = [
            ("model", "side", "batch", "s", "images/s", "sustained", "of floor", "peak GiB", "computed", "darkroom is")
        ]
        for data in found.values():
            if "side" not in data:
                continue
            ours = found.get(f"{data['family']} {OURS} {data['count']}")
            ratio = f"{data['seconds'] / ours['seconds']:.2f}x" if ours and data["side"] != OURS else "-"
            rows.append(
                (
                    data["family"],
                    data["side"],
                    str(data["count"]),
                    f"{data['seconds']:.3f}",
                    f"{data['count'] / data['seconds']:.2f}",
                    _shown(data.get("sustained")),
                    f"{data['share']:.2f}",
                    _shown(data.get("peak_gib")),
                    _shown(data.get("computed_gib")),
                    ratio,
                )
            )
        if len(rows) > 1:
            lines.append(table(rows))
        for data in found.values():
            if "classes" in data:
                lines.append(_breakdown_line(data))
        return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _breakdown_line(data: dict[str, Any]) -> str:
    total = sum(data["classes"].values()) or 1.0
    classes = ", ".join(f"{label} {100 * seconds / total:.0f} %" for label, seconds in data["classes"].items())
    whole = data["unet_s"] + data["vae_s"] + data["rest_s"]
    shares = ", ".join(
        f"{label} {data[key]:.3f} s ({100 * data[key] / whole:.0f} %)"
        for label, key in (("UNet", "unet_s"), ("decoder", "vae_s"), ("rest", "rest_s"))
    )
    return (
        f"{data['family']}, batch {data['count']}: {shares}; tick {data['tick_s'] * 1e3:.2f} ms, of it "
        f"{100 * data['beside']:.1f} % outside {data['beside_what']}; UNet: {classes}"
    )


def steady_tick_s(runs: list[Run]) -> float:
    """Median seconds from one tick's end to the next: what a tick costs with everything around it."""
    return statistics.median(span for run in runs for span in run.tick_spans_s())


@torch.inference_mode()
def unet_call(model: DiffusionModel, model_rows: int) -> Callable[[], object]:
    """One UNet call of `model_rows` rows of the model's own size, with random inputs."""
    unet, device, side = model.unet, model.device, model.card.width // model.vae_scale_factor

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(model.dtype)

    x = drawn(model_rows, model.latent_channels, side, side).contiguous(memory_format=torch.channels_last)
    projection = drawn(model_rows, unet.time_width)
    text_kv = drawn(model_rows, model.text.max_tokens, unet.text_kv_width)
    return lambda: unet(x, projection, text_kv, None)
