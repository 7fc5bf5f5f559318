"""Is the detector right? Scenes are drawn, some are spoilt as a generator might, and what is read is compared."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from training.detector import Detector, Reading
from training.figures import Share, save_sheet, share_of, table
from training.judging import case_of_scene, shows
from training.painting import at_image_px, scene_pixels
from training.world import FULL, KINDS, SPRITES, Scene, World, sample_scene

NUM_WRONG_SHOWN = 80


def _blurred(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A Gaussian blur of 0.8 pixels, and noise of 6 of 255."""
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    return Image.fromarray((soft + rng.normal(0, 6, soft.shape)).clip(0, 255).round().astype(np.uint8))


def _jpeg(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=50)
    return Image.open(content).convert("RGB")


def _tinted(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Half the resolution and back, and each channel brighter or darker by up to 6 %."""
    small = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    soft = np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((soft * rng.uniform(0.94, 1.06, 3)).clip(0, 255).round().astype(np.uint8))


CONDITIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "as drawn": lambda picture, _: picture,
    "blur and noise": _blurred,
    "JPEG 50": _jpeg,
    "halved and tinted": _tinted,
}


def scenes_of(kind: str, count: int, seed: int, world: World) -> list[Scene]:
    """`count` scenes of a kind, of any split, the same for the same seed."""
    return [
        sample_scene(random.Random(f"validate-{seed}-{kind}-{index}"), kind, "any", world) for index in range(count)
    ]


def is_read_right(reading: Reading, scene: Scene) -> bool:
    """Whether exactly the scene's objects, their relation and its background were read."""
    is_exact = Counter(reading.names) == Counter(placed.name for placed in scene.objects)
    return is_exact and shows(reading, case_of_scene(scene))


def validate(
    detector: Detector, count: int, seed: int, folder: Path, world: World = FULL
) -> dict[str, dict[str, Share]]:
    """Read `count` scenes of each kind under each condition, smaller pictures enlarged. Prints and writes tables.

    Returns kind -> condition -> share of scenes in which all was read right.
    """
    shares: dict[str, dict[str, Share]] = {kind: {} for kind in KINDS}
    wrong: list[tuple[np.ndarray, str]] = []
    false_finds, missed, absent = Counter[str](), Counter[str](), Counter[str]()
    for kind in KINDS:
        scenes = scenes_of(kind, count, seed, world)
        clean = at_image_px(scene_pixels(scenes, world.image_px))
        for name, spoil in CONDITIONS.items():
            rng = np.random.default_rng(seed)
            pixels = np.stack([np.asarray(spoil(Image.fromarray(picture), rng)) for picture in clean])
            readings = detector.read(pixels)
            passes = [is_read_right(*pair) for pair in zip(readings, scenes, strict=True)]
            shares[kind][name] = share_of(passes)
            for picture, reading, scene, is_right in zip(pixels, readings, scenes, passes, strict=True):
                _count_errors(reading, scene, false_finds, missed, absent)
                if not is_right:
                    names = ", ".join(placed.name for placed in scene.objects)
                    read = ", ".join(reading.names)
                    wrong.append((picture, f"{name}: {names}; {scene.background} -> {read}; {reading.background}"))
        print(kind, *(f"{name}: {share}" for name, share in shares[kind].items()), sep="  ", flush=True)
    text = _as_markdown(shares, false_finds, missed, absent)
    print(text)
    (folder / "validation.md").write_text(text)
    as_json = {kind: {name: share.as_json() for name, share in row.items()} for kind, row in shares.items()}
    (folder / "validation.json").write_text(json.dumps(as_json, indent=2) + "\n")
    if wrong:
        shown = wrong[:: max(1, -(-len(wrong) // NUM_WRONG_SHOWN))]
        save_sheet(folder / "misread.png", [p for p, _ in shown], [c for _, c in shown], [False] * len(shown))
    return shares


def _count_errors(
    reading: Reading, scene: Scene, false_finds: Counter[str], missed: Counter[str], absent: Counter[str]
) -> None:
    """Note which objects were read that are not there, which were not that are, and which are not there."""
    there = {placed.name for placed in scene.objects}
    read = set(reading.names)
    false_finds.update(read - there)
    missed.update(there - read)
    absent.update(set(SPRITES) - there)


def _as_markdown(
    shares: dict[str, dict[str, Share]], false_finds: Counter[str], missed: Counter[str], absent: Counter[str]
) -> str:
    rows = [(kind, *map(str, row.values())) for kind, row in shares.items()]
    everything = [sum((row[name] for row in shares.values()), Share(0, 0)) for name in CONDITIONS]
    rates = [Share(false_finds[name], absent[name]) for name in SPRITES]
    total = sum(rates, Share(0, 0))
    falsely, unread = (
        ", ".join(f"{name} {number}" for name, number in counter.most_common(10)) or "none"
        for counter in (false_finds, missed)
    )
    return "\n".join(
        [
            table(("kind of scene", *CONDITIONS), [*rows, ("all", *map(str, everything))]),
            f"An object that is not there is read in {100 * total.value:.3f} % of checks, one for each picture and "
            f"object ({total.passed} of {total.total}); the worst object in {100 * max(r.value for r in rates):.2f} %.",
            f"Most often read where it is not: {falsely}.",
            f"Most often not read: {unread}.\n",
        ]
    )
