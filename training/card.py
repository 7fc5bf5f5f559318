"""Write the model cards, README.md of each model's folder: `python -m training.card --reports runs/evaluation`.

All that a card says of a run comes from the `training.json` beside the weights, and every figure from the report that
`training.evaluate` wrote of these weights, REPORTS/NAME/report.json. What neither of them holds is not measured yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from darkroom.config import BUILTIN_MODEL
from darkroom.diffusion.loader import read_card

from training.captions import PLACE_PHRASES
from training.figures import Share, category_table, difference, table
from training.judging import README_CASES
from training.recipes import RECIPES, recipe_of
from training.world import PLACES, PLAIN, World, is_held_out_pair

UNKNOWN = "not measured yet"
STAGES = {"text": "text encoder", "vae": "autoencoder", "unet": "denoiser", "student": "student"}
# Of what `training.json` holds of a stage, in the order of the table's lines.
RECORDED = {
    "recipe": "recipe",
    "parameters": "parameters",
    "updates": "updates",
    "batch": "examples in an update",
    "scenes": "scenes",
    "lr": "highest learning rate",
    "decoder_only": "the decoder alone",
    "seed": "seed",
    "minutes": "training time, minutes",
    "device": "device",
    "torch": "torch",
    "loss": "last loss",
    "psnr_db": "PSNR on held-out scenes while training, dB",
}
TEACHER_STEPS = 25
MOST_POINTS_APART = 10
LEAST_PSNR_DB = 30
LEAST_SEEDS = 8
# Least share of the prompts of a category, in trained combinations.
LEAST = {"single object": 0.95, "two objects": 0.85, "position": 0.85, "background": 0.97}


@dataclass(frozen=True)
class Figure:
    """A line of the table of aims; `is_met` None where it was not measured."""

    name: str
    aim: str
    measured: str = UNKNOWN
    is_met: bool | None = None

    def row(self) -> tuple[str, str, str, str]:
        return self.name, self.aim, self.measured, "-" if self.is_met is None else "met" if self.is_met else "missed"


def share_in(row: dict[str, Any]) -> Share:
    return Share(row["passed"], row["total"])


class Measured:
    """A report of `training.evaluate`; an empty one where there was no evaluation."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        rows = {(row["category"], row["split"]): row for row in report.get("categories", ())}
        self.categories = {key: share_in(row) for key, row in rows.items()}
        self.combinations = {key: row["combinations"] for key, row in rows.items()}
        self.prompts = {row["prompt"]: share_in(row) for row in report.get("readme", ())}

    def at_steps(self, num_inference_steps: int) -> Share | None:
        """The score of the sweep over steps, by the sampler of the main table."""
        for row in self.report.get("steps", ()):
            if (row["sampler"], row["num_inference_steps"]) == (self.sampler, num_inference_steps):
                return share_in(row)
        return None

    @property
    def sampler(self) -> str | None:
        return self.report["sampling"]["sampler"] if self.report else None


def figures_of_teacher(measured: Measured) -> list[Figure]:
    figures = []
    for category, least in LEAST.items():
        share = measured.categories.get((category, "trained"))
        name, aim = category.capitalize(), f"at least {100 * least:.0f} %"
        figures.append(Figure(name, aim, str(share), share.value >= least) if share else Figure(name, aim))
    apart = [measured.categories.get(("two objects", split)) for split in ("trained", "held_out")]
    figures.append(_points_apart("Two objects, trained before held-out pairs", *apart))
    psnr = measured.report.get("vae_psnr_db")
    name, aim = "Autoencoder on held-out scenes", f"at least {LEAST_PSNR_DB} dB"
    figures.append(Figure(name, aim) if psnr is None else Figure(name, aim, f"{psnr:.1f} dB", psnr >= LEAST_PSNR_DB))
    for prompt in dict.fromkeys(case.prompt for case in README_CASES):
        share = measured.prompts.get(prompt)
        name, aim = f"*{prompt}*", f"everything named in {LEAST_SEEDS} of 10 seeds"
        if share is None:
            figures.append(Figure(name, aim))
        else:
            is_met = share.value >= LEAST_SEEDS / 10
            figures.append(Figure(name, aim, f"{share.passed} of {share.total}", is_met))
    return figures


def figures_of_student(student: Measured, teacher: Measured, num_inference_steps: int) -> list[Figure]:
    """Raises `ValueError` where the two were not asked for the same pictures."""
    name = f"Teacher at {TEACHER_STEPS} steps before student at {num_inference_steps}"
    better, worse = teacher.at_steps(TEACHER_STEPS), student.at_steps(num_inference_steps)
    if better and worse:
        asked = [(measured.report["seed"], share.total) for measured, share in ((teacher, better), (student, worse))]
        if asked[0] != asked[1]:
            raise ValueError(
                f"teacher and student have seed and number of prompts {asked}: evaluate both with the same"
            )
    return [_points_apart(name, better, worse)]


def _points_apart(name: str, better: Share | None, worse: Share | None) -> Figure:
    aim = f"at most {MOST_POINTS_APART} points"
    if not better or not worse:
        return Figure(name, aim)
    points, low, high = (100 * value for value in difference(better, worse))
    measured = f"{points:.1f} points ({low:.1f} to {high:.1f}): {better}; {worse}"
    return Figure(name, aim, measured, points <= MOST_POINTS_APART)


def model_card(
    serving: dict[str, Any],
    training: dict[str, dict[str, Any]],
    world: World,
    measured: Measured,
    figures: Sequence[Figure],
) -> str:
    """The card in Markdown. `serving` is `darkroom.json`, `training` is `training.json`."""
    return "\n".join(
        [
            f"# {serving['id']}\n",
            f"{serving['description']} Darkroom ships it, so that there are real weights to serve on any computer. The "
            "folder is in the layout of diffusers (`StableDiffusionPipeline`), in fp16 safetensors; `darkroom.json` "
            f"holds what it is served with: {serving['sampler']}, {serving['num_inference_steps']} steps, guidance "
            f"{serving['guidance_scale']:g}, {serving['width']} x {serving['height']} px.\n",
            "This card is written by `python -m training.card` and not by hand.\n",
            _uses(world),
            _vocabulary(world),
            "## Data and licence\n",
            "Scenes that `training/painting.py` draws from a seed, with captions made from them by "
            "`training/captions.py`. The glyphs are those of [Noto Color Emoji]"
            "(https://github.com/googlefonts/noto-emoji), Copyright Google, under the SIL Open Font License 1.1. No "
            f"other pictures or texts were used.\n\nLicence: {serving['license']}.\n",
            _training(training),
            "## Figures\n",
            _how_measured(measured),
            table(("figure", "aim", "measured", ""), [figure.row() for figure in figures]),
            *_tables(measured),
        ]
    )


def _uses(world: World) -> str:
    return (
        "## What it is for\n\n"
        "Trying out, testing and showing a server of diffusion models: it needs no GPU and no download, and a glance "
        "at a picture tells whether the right thing was drawn.\n\n"
        "## What it cannot do\n\n"
        "It knows nothing outside the lists below: an unknown word is passed over, or gives one of the known objects "
        "or a mixture. It draws one to four things, no text, and no style but the font's. It was trained at "
        f"{world.image_px} x {world.image_px} px only. Prompts are English. {_held_out(world)}\n"
    )


def _held_out(world: World) -> str:
    names = (*world.objects, *world.shape_names)
    pairs = list(combinations(names, 2))
    num_held_out = sum(is_held_out_pair(*pair) for pair in pairs)
    return (
        f"Of the {len(pairs)} pairs of objects and shapes {num_held_out} were never shown together, and one in ten of "
        "the others not in one of the relations, so that the figures say what it makes of new combinations."
    )


def _vocabulary(world: World) -> str:
    lists = {
        "Objects": world.objects,
        "Places": [PLACE_PHRASES[place][0] for place in PLACES],
        "Plain backgrounds": PLAIN,
        "Shapes": world.shapes,
        "Colours of shapes": world.colours,
        "Foods that a house can be made of": world.materials,
        "Relations": (
            "left of", "right of", "above", "below", "next to", "riding", "in", "in front of", "looking at", "facing",
            "looking in the mirror",
        ),
        "Numbers": ("two", "three", "four"),
        "Sizes of one object": ("small", "big"),
    }  # fmt: skip
    lines = "\n".join(f"- {name}: {', '.join(words)}." for name, words in lists.items())
    return f"## What it knows\n\n{lines}\n\nSynonyms of many of them, articles and another word order do as well.\n"


def _training(training: dict[str, dict[str, Any]]) -> str:
    stages = [stage for stage in STAGES if stage in training]
    rows = [
        (words, *(_told(training[stage].get(name)) for stage in stages))
        for name, words in RECORDED.items()
        if any(name in training[stage] for stage in stages)
    ]
    minutes = sum(training[stage]["minutes"] for stage in stages)
    recipe = RECIPES[training["unet"]["recipe"]]
    parts = "".join(
        _part(stage, part, training[stage]) for stage in stages for part in training[stage].get("before", ())
    )
    return (
        f"## Training\n\n{table(('', *(STAGES[stage] for stage in stages)), rows)}\n{parts}"
        f"All stages together trained for {minutes:.1f} minutes. The recipe is run anew by `make dev` and then "
        f'`make train-model TRAIN_ARGS="--recipe {recipe.name}"`, which trains for {recipe.minutes:g} minutes; '
        "`training/README.md` tells the rest. Scenes and captions follow from the seed; the weights come out a little "
        "different each time.\n"
    )


def _part(stage: str, part: dict[str, Any], last: dict[str, Any]) -> str:
    """A sentence on what a stage did before it went on with other options, those of the table."""
    progress = ("updates", "minutes")
    others = [
        f"{words} {_told(part.get(name, False))}"
        for name, words in RECORDED.items()
        if name not in (*progress, "parameters", "loss", "psnr_db") and part.get(name) != last.get(name)
    ]
    return (
        f"Other options for the first {part['updates']:,} updates ({part['minutes']:.1f} minutes) of the "
        f"{STAGES[stage]}: {', '.join(others)}.\n\n"
    )


def _told(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _how_measured(measured: Measured) -> str:
    if not measured.report:
        return f"`python -m training.evaluate` draws and scores fixed prompts. For these weights: {UNKNOWN}.\n"
    sampling = measured.report["sampling"]
    return (
        "`python -m training.evaluate` has Darkroom draw fixed prompts; a detector that compares with the font's own "
        f"glyphs and the drawn backgrounds reads the pictures. Drawn by {sampling['sampler']}, "
        f"{sampling['num_inference_steps']} steps, guidance "
        f"{sampling['guidance_scale']:g}, where nothing else is said, on {measured.report['device']}, from seed "
        f"{measured.report['seed']}. Shares of the prompts drawn as asked, each thing as often as it is named, with "
        "95 % intervals (Wilson). Combinations are the different things that a category's prompts ask for: where they "
        "are few, their pictures differ by seed and place, and the interval says little of other combinations. Two "
        "things look as asked by chance in half of all pictures, at each other in a quarter.\n"
    )


def _tables(measured: Measured) -> list[str]:
    """All that was measured: categories, prompts, samplers with their steps, guidance."""
    tables = []
    if measured.categories:
        tables.append(category_table(measured.categories, measured.combinations))
    if measured.prompts:
        rows = [(prompt, str(share)) for prompt, share in measured.prompts.items()]
        tables.append(table(("prompt", "everything named"), rows))
    for name, heading in (("steps", "Score by sampler and steps"), ("guidance", "Score by guidance")):
        if swept := measured.report.get(name):
            rows = [
                (row["sampler"], str(row["num_inference_steps"]), f"{row['guidance_scale']:g}", str(share_in(row)))
                for row in swept
            ]
            tables.append(f"{heading}, over single objects, two objects, position and background:\n")
            tables.append(table(("sampler", "steps", "guidance", "drawn as asked"), rows))
    return tables


def read_report(reports: Path, folder: Path) -> Measured:
    """The report of a folder's weights, an empty one where there is none. Raises `ValueError` on one of others."""
    path = reports / folder.name / "report.json"
    if not path.exists():
        return Measured({})
    report = json.loads(path.read_text())
    if report["weights_hash"] != read_card(folder).weights_hash:
        raise ValueError(f"{path} is of other weights than those in {folder}: evaluate them anew")
    return Measured(report)


def write_cards(models: Path, reports: Path) -> list[Path]:
    """Write the card of each model that this recipe made. Returns their paths. Raises `ValueError` as `read_report`."""
    folders = sorted(path.parent for path in models.glob("*/training.json"))
    measured = {folder.name: read_report(reports, folder) for folder in folders}
    cards = []
    for folder in folders:
        serving, training = (json.loads((folder / name).read_text()) for name in ("darkroom.json", "training.json"))
        if "student" in training:
            teacher = measured.get(BUILTIN_MODEL.name, Measured({}))
            figures = figures_of_student(measured[folder.name], teacher, serving["num_inference_steps"])
        else:
            figures = figures_of_teacher(measured[folder.name])
        cards.append(folder / "README.md")
        cards[-1].write_text(model_card(serving, training, recipe_of(folder).world, measured[folder.name], figures))
    return cards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=BUILTIN_MODEL.parent, help="holds the models' folders")
    parser.add_argument("--reports", type=Path, default=Path("runs/evaluation"), help="holds a folder for each model")
    args = parser.parse_args()
    try:
        cards = write_cards(args.models, args.reports)
    except ValueError as error:
        sys.exit(str(error))
    for path in cards:
        print(path)


if __name__ == "__main__":
    main()
