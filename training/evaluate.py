"""Score a model in the style of GenEval: `python -m training.evaluate MODEL --out DIR`.

Darkroom draws pictures of fixed prompts, `detector.py` reads them, `judging.py` compares. DIR gets `report.md`,
`report.json`, plots and contact sheets. `--validate` needs no model: it asks how often the detector itself is right.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.samplers import compile_sampler
from darkroom.errors import InvalidRequest

from training.detector import Detector, Reading
from training.drawing import Sampling, draw, load, vae_psnr_db
from training.figures import Share, category_table, plot_curves, save_sheet, share_of, table
from training.judging import CATEGORIES, README_CASES, Case, cases_of, shows
from training.painting import at_image_px
from training.recipes import RECIPES, recipe_of
from training.validation import validate
from training.world import World

README_SEEDS = 10
NUM_FAILURES = 60
# What the sweeps over samplers, steps and guidance ask for.
SWEPT = (("single object", "trained"), ("two objects", "trained"), ("position", "trained"), ("background", "trained"))
Draw = Callable[[Sequence[str], Sequence[int], Sampling], np.ndarray]


@dataclass
class Report:
    """What has been measured so far. `categories` by category and split, with how many different
    `combinations` they ask for; `readme` by prompt; `steps` and `guidance` are rows of sampling and share."""

    model: str
    weights_hash: str
    device: str
    sampling: Sampling
    seed: int
    vae_psnr_db: float | None = None
    categories: dict[tuple[str, str], Share] = field(default_factory=dict)
    combinations: dict[tuple[str, str], int] = field(default_factory=dict)
    readme: dict[str, Share] = field(default_factory=dict)
    steps: list[tuple[Sampling, Share]] = field(default_factory=list)
    guidance: list[tuple[Sampling, Share]] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "weights_hash": self.weights_hash,
            "seed": self.seed,
            "device": self.device,
            "seconds": round(self.seconds, 1),
            "sampling": asdict(self.sampling),
            "vae_psnr_db": self.vae_psnr_db,
            "categories": [
                {
                    "category": category,
                    "split": split,
                    "combinations": self.combinations[category, split],
                    **share.as_json(),
                }
                for (category, split), share in self.categories.items()
            ],
            "readme": [{"prompt": prompt, **share.as_json()} for prompt, share in self.readme.items()],
            "steps": [{**asdict(sampling), **share.as_json()} for sampling, share in self.steps],
            "guidance": [{**asdict(sampling), **share.as_json()} for sampling, share in self.guidance],
        }

    def as_markdown(self) -> str:
        sampling = self.sampling
        psnr = "not measured yet" if self.vae_psnr_db is None else f"{self.vae_psnr_db:.1f} dB"
        parts = [
            f"# {self.model}\n",
            f"{sampling.sampler} ({sampling.sigma_schedule}), {sampling.num_inference_steps} steps, guidance "
            f"{sampling.guidance_scale:g}, on {self.device}. Shares of the prompts that were drawn as asked, with 95 % "
            f"intervals (Wilson). The autoencoder's PSNR on held-out scenes: {psnr}.\n",
            category_table(self.categories, self.combinations),
            table(("prompt, 10 seeds each", "everything named"), [(p, str(share)) for p, share in self.readme.items()]),
        ]
        for title, rows in (("steps", self.steps), ("guidance", self.guidance)):
            if rows:
                parts.append(
                    table(
                        ("sampler", "steps", "guidance", f"score by {title}"),
                        [
                            (s.sampler, str(s.num_inference_steps), f"{s.guidance_scale:g}", str(share))
                            for s, share in rows
                        ],
                    )
                )
        return "\n".join(parts)

    def write(self, folder: Path) -> None:
        (folder / "report.json").write_text(json.dumps(self.as_json(), indent=2) + "\n")
        (folder / "report.md").write_text(self.as_markdown())
        if self.steps:
            curves: dict[str, list[tuple[float, Share]]] = {}
            for sampling, share in self.steps:
                curves.setdefault(sampling.sampler, []).append((sampling.num_inference_steps, share))
            plot_curves(
                folder / "steps.png", curves, "steps", f"{self.model}, guidance {self.sampling.guidance_scale:g}"
            )
        if self.guidance:
            points = [(sampling.guidance_scale, share) for sampling, share in self.guidance]
            title = f"{self.model}, {self.sampling.num_inference_steps} steps"
            plot_curves(folder / "guidance.png", {self.sampling.sampler: points}, "guidance scale", title)


@dataclass(frozen=True)
class Judged:
    """One picture and what became of it."""

    case: Case
    picture: np.ndarray
    reading: Reading
    is_right: bool

    @property
    def caption(self) -> str:
        seen = ", ".join(self.reading.names) or "nothing"
        return f"{self.case.prompt}: {seen}; {self.reading.background}"


def device_name(model: DiffusionModel) -> str:
    """Where and in which dtype the network ran."""
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "a CPU"
    return f"{name} in {str(model.dtype).removeprefix('torch.')}"


def judge(
    cases: Sequence[Case], seeds: Sequence[int], sampling: Sampling, draw: Draw, detector: Detector
) -> list[Judged]:
    """Draw and read a picture of each case."""
    pictures = at_image_px(draw([case.prompt for case in cases], seeds, sampling))
    readings = detector.read(pictures)
    return [
        Judged(case, picture, reading, shows(reading, case))
        for case, picture, reading in zip(cases, pictures, readings, strict=True)
    ]


def share(judged: Sequence[Judged]) -> Share:
    return share_of([entry.is_right for entry in judged])


def score_categories(
    report: Report, world: World, draw: Draw, detector: Detector, count: int, seed: int
) -> list[Judged]:
    """Every category and split, then the README's prompts. Returns all pictures."""
    wanted = [(category, split) for category, (_, splits) in CATEGORIES.items() for split in splits]
    cases = [case for category, split in wanted for case in cases_of(category, split, count, seed, world)]
    readme = [case for case in README_CASES for _ in range(README_SEEDS)]
    seeds = [index % count for index in range(len(cases))] + [index % README_SEEDS for index in range(len(readme))]
    judged = judge(cases + readme, seeds, report.sampling, draw, detector)
    for category, split in wanted:
        of_these = [entry for entry in judged if (entry.case.category, entry.case.split) == (category, split)]
        report.categories[category, split] = share(of_these)
        report.combinations[category, split] = len({entry.case.asked for entry in of_these})
    for case in README_CASES:
        report.readme[case.prompt] = share([entry for entry in judged if entry.case == case])
    return judged


def score_swept(sampling: Sampling, world: World, draw: Draw, detector: Detector, count: int, seed: int) -> Share:
    """One share over `count` cases of each of `SWEPT`."""
    cases = [case for category, split in SWEPT for case in cases_of(category, split, count, seed, world)]
    return share(judge(cases, [index % count for index in range(len(cases))], sampling, draw, detector))


def save_sheets(folder: Path, judged: Sequence[Judged]) -> None:
    """The README's prompts, and failures of all categories in turn."""
    readme = [entry for entry in judged if entry.case.category == "README"]
    wrong = [entry for entry in judged if not entry.is_right and entry.case.category != "README"]
    # Evenly over the categories, which lie one after the other.
    wrong = wrong[:: max(1, -(-len(wrong) // NUM_FAILURES))]
    for name, entries in (("readme", readme), ("failures", wrong)):
        if entries:
            columns = zip(*((entry.picture, entry.caption, entry.is_right) for entry in entries), strict=True)
            save_sheet(folder / f"{name}.png", *map(list, columns))


def evaluate(model: DiffusionModel, world: World, detector: Detector, args: argparse.Namespace) -> Report:
    """Measure all that the arguments ask for; sweeps end early when the time is over. Raises `InvalidRequest` for a
    sampler or a number of steps that the model cannot be drawn with."""
    began_s = time.monotonic()
    sampling = Sampling.of(model)
    own = {"sampler": args.sampler, "num_inference_steps": args.num_steps, "guidance_scale": args.guidance_scale}
    sampling = sampling.but(**{name: value for name, value in own.items() if value is not None})
    report = Report(model.id, model.card.weights_hash, device_name(model), sampling, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    def drawn(prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> np.ndarray:
        return draw(model, prompts, seeds, sampling, args.batch_size)

    def note(text: str) -> None:
        report.seconds = time.monotonic() - began_s
        print(f"{report.seconds:7.1f} s  {text}", flush=True)
        # An earlier report stays until this one has as much to say.
        if report.categories:
            report.write(args.out)

    stepped = [
        sampling.but(sampler=sampler, num_inference_steps=steps) for sampler in args.samplers for steps in args.steps
    ]
    for asked in (sampling, *stepped):  # what cannot be drawn is refused before an hour is spent
        compile_sampler(asked.sampler, model.schedule, asked.num_inference_steps, asked.sigma_schedule)
    report.vae_psnr_db = vae_psnr_db(model, world)
    note(f"autoencoder {report.vae_psnr_db:.2f} dB")
    judged = score_categories(report, world, drawn, detector, args.count, args.seed)
    save_sheets(args.out, judged)
    note(f"{len(judged)} pictures of {len(CATEGORIES)} categories and the README's prompts")
    guided = [sampling.but(guidance_scale=scale) for scale in args.guidance]
    for rows, asked in ((report.steps, stepped), (report.guidance, guided)):
        for other in asked:
            if time.monotonic() - began_s > 60 * args.minutes:
                note("time is over: the rest is not measured")
                return report
            rows.append((other, score_swept(other, world, drawn, detector, args.sweep_count, args.seed)))
            note(
                f"{other.sampler}, {other.num_inference_steps} steps, guidance {other.guidance_scale:g}: {rows[-1][1]}"
            )
    return report


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[float]:
    return [float(part) for part in names(text)]


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in names(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a diffusers folder")
    parser.add_argument("--validate", action="store_true", help="judge the detector on drawn scenes instead")
    parser.add_argument("--recipe", choices=RECIPES, help="whose world it is; default: training.json's, or full")
    parser.add_argument("--out", type=Path, help="folder of the report; default: one in runs/evaluation")
    parser.add_argument("--count", type=int, default=100, help="prompts of each category and split")
    parser.add_argument("--sweep-count", type=int, default=50, help="prompts of each category in a sweep")
    parser.add_argument("--samplers", type=names, default=["dpmpp_2m", "ddim", "euler"], help="to sweep")
    parser.add_argument("--steps", type=whole_numbers, default=[4, 8, 15, 25], help="to sweep with each sampler")
    parser.add_argument("--guidance", type=numbers, default=[1.0, 2.0, 3.0, 5.0], help="scales to sweep")
    parser.add_argument("--sampler", help="of the main table; default: the model's own")
    parser.add_argument("--num-steps", type=int, help="of the main table and of the sweep over guidance")
    parser.add_argument("--guidance-scale", type=float, help="of the main table and of the sweep over steps")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--minutes", type=float, default=60.0, help="no sweep begins after so long")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()

    if args.model is None and not args.validate:
        parser.error("a model's folder is needed, or --validate")
    if args.model is not None and not (args.model / "model_index.json").exists():
        parser.error(f"{args.model} is not a diffusers folder: it has no model_index.json")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    detector = Detector(torch.device(args.device))
    if args.out is None:
        args.out = Path("runs/evaluation") / (args.model.resolve().name if args.model else "detector")
    if args.validate:
        args.out.mkdir(parents=True, exist_ok=True)
        validate(detector, args.count, args.seed, args.out, RECIPES[args.recipe or "full"].world)
        return
    try:
        recipe = RECIPES[args.recipe] if args.recipe else recipe_of(args.model)
    except ValueError as error:
        parser.error(f"{error}; name it with --recipe")
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    model = load(args.model, args.device, dtypes[args.dtype] if args.dtype else None)
    try:
        report = evaluate(model, recipe.world, detector, args)
    except InvalidRequest as error:
        parser.error(str(error))
    print(report.as_markdown())


if __name__ == "__main__":
    main()
