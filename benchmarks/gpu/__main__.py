"""`python -m benchmarks.gpu [--section kernels|models|batching] [--quick] [--fresh] [--device cuda]`.

Each section runs in a process of its own, so that a kernel which breaks the device takes only its own item along.
Exit codes: 0 all measured (or found unmeasurable, with the reason), 1 a section failed, 2 no such device, 4 the time
limit came first and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from darkroom.config import BUILTIN_MODEL, load_settings
from darkroom.worker.main import load_models

from benchmarks.families import SD15, SD21, SDXL, TOY, write_model
from benchmarks.gpu.batching import LOADS, BatchingSection
from benchmarks.gpu.models import ModelsSection, Plan
from benchmarks.gpu.pipelines import COMPILE_MODES
from benchmarks.gpu.running import RunningEngine
from benchmarks.gpu.sections import DeviceBroken, State, report, run_section
from benchmarks.record import RESULTS, commit, device_name, versions

HERE = Path(__file__).parents[1]
SECTIONS = ("kernels", "models", "batching")
FAILED, NO_DEVICE, BROKEN, OUT_OF_TIME = 1, 2, 3, 4
QUICK_LIMITS_S = {"kernels": 25.0, "models": 35.0, "batching": 25.0}
MAX_PROCESSES = 20
# Beyond the time limit, an item in flight may take this long before its process is ended.
GRACE_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.device.startswith("cpu") and not torch.cuda.is_available():
        print(
            f"benchmarks.gpu: torch {torch.__version__} sees no CUDA device here; these figures need one. "
            "`--device cpu` runs every section at toy size, to test the benchmarks themselves.",
            file=sys.stderr,
        )
        return NO_DEVICE
    sections = [options.section] if options.section else list(SECTIONS)
    if options.child:
        return run_one(sections[0], options)
    if options.fresh:
        state_of(options).forget(sections)
    given = [word for word in (sys.argv[1:] if arguments is None else arguments) if word != "--fresh"]
    codes = [run_in_process(section, options, given) for section in sections]
    for section in sections:
        print(report(make_section(section, options), state_of(options)), flush=True)
    if OUT_OF_TIME in codes:
        print("\nThe time limit came first; the same command goes on from here.")
    return next((code for code in (FAILED, OUT_OF_TIME) if code in codes), 0)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--section", choices=SECTIONS, help="one section (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few items of each, begun within 85 s in all")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs measured")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="only items with this in their name; `*` stands for any text, and the option may be given again",
    )
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="of the models section, instead of all")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu at toy size")
    parser.add_argument("--time-limit", type=float, default=480.0, metavar="SECONDS", help="for each section")
    parser.add_argument("--compile-mode", choices=COMPILE_MODES, default=COMPILE_MODES[0], help="of diffusers")
    parser.add_argument("--window", type=float, default=None, metavar="SECONDS", help="of a Poisson point")
    parser.add_argument("--state", type=Path, default=HERE / "state" / "gpu.json", help="what is measured so far")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plots", type=Path, default=HERE / "plots")
    parser.add_argument("--models-dir", type=Path, default=Path(tempfile.gettempdir()) / "darkroom-random-models")
    parser.add_argument(
        "--no-record", action="store_true", help="write no rows; on a CPU rows are never written, except with --record"
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and torch.cuda.is_available():
        options.device = f"cuda:{torch.cuda.current_device()}"
    return options


def run_in_process(section: str, options: argparse.Namespace, arguments: list[str]) -> int:
    """Run one section in processes of its own, a new one whenever one dies, until it is over."""
    limit_s = section_limit_s(section, options)
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--child", "--section", section]
    for _ in range(MAX_PROCESSES):
        try:
            code = subprocess.run(command, cwd=HERE.parent, timeout=limit_s + GRACE_S).returncode
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        if code in (0, FAILED, NO_DEVICE, OUT_OF_TIME):
            return code
        print(f"{section}: the process ended with code {code}; going on in a new one", flush=True)
    return FAILED


def run_one(name: str, options: argparse.Namespace) -> int:
    """The child: this section, in this process."""
    section = make_section(name, options)
    is_cpu = options.device.startswith("cpu")
    recording = options.record or not (is_cpu or options.no_record)
    quick = " --quick" if options.quick else ""
    batches = f" --batches {' '.join(map(str, options.batches))}" if options.batches else ""
    device = "" if not is_cpu else " --device cpu"
    try:
        is_over = run_section(
            section,
            state_of(options),
            time_limit_s=section_limit_s(name, options),
            only=tuple(options.only),
            results=options.results if recording else None,
            command=f"python -m benchmarks.gpu --section {name}{quick}{batches}{device}",
            device=device_name("cpu" if is_cpu else "cuda"),
            is_quick=options.quick,
            say=lambda line: print(line, flush=True),
        )
    except DeviceBroken:
        return BROKEN
    finally:
        section.close()
    return 0 if is_over else OUT_OF_TIME


def section_limit_s(section: str, options: argparse.Namespace) -> float:
    return min(options.time_limit, QUICK_LIMITS_S[section]) if options.quick else float(options.time_limit)


def state_of(options: argparse.Namespace) -> State:
    is_cpu = options.device.startswith("cpu")
    identity = {
        "commit": commit(),
        "device": device_name("cpu" if is_cpu else "cuda"),
        "versions": versions("triton", "diffusers"),
        "form": "quick" if options.quick else "full",
        "compile_mode": options.compile_mode,
    }
    # One file for each form, so that a quick run forgets nothing of a full one.
    name = "-".join([options.state.stem, *(["quick"] if options.quick else []), options.compile_mode])
    return State(options.state.with_stem(name), identity)


def make_section(name: str, options: argparse.Namespace) -> Any:
    device = torch.device(options.device)
    is_cpu, quick = device.type == "cpu", options.quick
    settings = load_settings(device=options.device)
    if name == "kernels":
        from benchmarks.gpu.kernels import KernelsSection

        return KernelsSection(device, quick=quick)
    if name == "models":
        if is_cpu:
            plan = Plan((TOY,), (1, 2), (), (2,), num_steps=3, num_seeds=2, quality_steps=2, rounds=1)
        elif quick:
            plan = Plan((SD15,), (1, 8), (), (8,), num_seeds=0, rounds=1)
        else:
            plan = Plan((SD15, SDXL, SD21), compile_mode=options.compile_mode)
        if options.batches:
            wanted = tuple(options.batches)
            plan = replace(plan, batches=wanted, compiled_batches=wanted, breakdown_batches=wanted)
        return ModelsSection(plan, settings, device, options.models_dir)
    window_s = options.window or (5.0 if quick else 25.0 if is_cpu else 60.0)
    settings = settings.model_copy(update={"encode_threads": 2 if is_cpu else 8})

    def make_engine() -> RunningEngine:
        path = BUILTIN_MODEL if is_cpu else write_model(SD15, options.models_dir, device)
        return RunningEngine(next(iter(load_models(settings, [path]).values())), settings)

    return BatchingSection(
        make_engine,
        "built-in model" if is_cpu else SD15.name,
        window_s=window_s,
        loads=LOADS[:1] if quick else LOADS,
        policies=("step", "request") if quick else ("step", "request", "serial"),
        count=24 if quick else 96 if not is_cpu else 48,
        plots=options.plots / f"batching-{'cpu' if is_cpu else 'gpu'}{'-quick' if quick else ''}.png",
    )


if __name__ == "__main__":
    sys.exit(main())
