"""The evaluation: a detector that reads pictures, prompts with a known answer, and what becomes of both."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from darkroom.config import load_settings
from darkroom.engine.local import generate_images
from PIL import Image

from tests.support.engines import pixels, request_for
from tests.support.tiny_models import write_tiny_model
from training import drawing, evaluate, validation
from training.detector import Detection, Detector, Reading
from training.figures import Share, difference
from training.judging import CATEGORIES, README_CASES, UNRELATED, Case, case_of_scene, cases_of, shows
from training.painting import render, scene_pixels
from training.world import Placed, Scene, is_held_out_pair, is_held_out_relation, sample_scene

NAMES = (
    "duck", "turtle", "dog", "cat", "horse", "astronaut", "house", "house of sushi", "mirror", "red circle", "sushi",
)  # fmt: skip


@pytest.fixture(scope="module")
def detector() -> Detector:
    """It knows fewer sprites than the world has, which takes less time."""
    return Detector(torch.device("cpu"), NAMES)


def read(detector: Detector, *scenes: Scene) -> list[Reading]:
    return detector.read(scene_pixels(scenes))


def reading(*detections: tuple[str, float, float, float], background: str = "white") -> Reading:
    return Reading(tuple(Detection(*place, flip=False, score=1.0) for place in detections), background)


DUCK_AND_TURTLE = Scene((Placed("duck", 0.27, 0.55, 0.45), Placed("turtle", 0.74, 0.55, 0.44)), "forest", "left")
RIDER = Scene((Placed("astronaut", 0.5, 0.3, 0.4), Placed("horse", 0.5, 0.68, 0.58)), "white", "riding")
HOME = Scene((Placed("dog", 0.5, 0.68, 0.38), Placed("house of sushi", 0.5, 0.5, 0.86)), "night", "in")
MIRROR = Scene(
    (Placed("dog", 0.23, 0.72, 0.42, True), Placed("cat", 0.69, 0.48, 0.37), Placed("mirror", 0.69, 0.47, 0.86)),
    "beach",
    "mirror",
)
THREE = Scene(tuple(Placed("red circle", x, 0.53, 0.32) for x in (0.18, 0.5, 0.82)), "yellow", "count")
SCENES = {"two": DUCK_AND_TURTLE, "a rider": RIDER, "a home of sushi": HOME, "a mirror": MIRROR, "three": THREE}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_a_drawn_scene_is_read_exactly_though_parts_are_hidden(detector: Detector, scene: Scene) -> None:
    (found,) = read(detector, scene)
    assert validation.is_read_right(found, scene), found


def test_a_sprite_is_read_where_it_is_and_as_it_faces(detector: Detector) -> None:
    placed = Placed("dog", 0.4, 0.6, 0.5, flip=True)
    (found,) = read(detector, Scene((placed,), "sea"))[0].detections
    assert (found.name, found.flip) == ("dog", True)
    assert abs(found.x - placed.x) + abs(found.y - placed.y) + abs(found.size - placed.size) < 0.08


@pytest.mark.parametrize("name", [name for name in validation.CONDITIONS if name != "as drawn"])
def test_a_spoilt_picture_is_still_read_right(detector: Detector, name: str) -> None:
    rng = np.random.default_rng(0)
    pictures = np.stack([np.asarray(validation.CONDITIONS[name](render(s), rng)) for s in SCENES.values()])
    for found, scene in zip(detector.read(pictures), SCENES.values(), strict=True):
        assert validation.is_read_right(found, scene), found


@pytest.mark.parametrize("background", ["white", "forest", "night", "city"])
def test_nothing_is_read_where_nothing_known_is(detector: Detector, background: str) -> None:
    """Neither in an empty place nor in noise nor where another object stands."""
    scenes = [Scene((), background), Scene((Placed("castle", 0.5, 0.5, 0.6),), background)]
    for found in read(detector, *scenes):
        assert (found.names, found.background) == ([], background)
    noise = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8)
    assert detector.read(noise)[0].names == []


def test_a_picture_is_read_the_same_alone_and_among_others(detector: Detector) -> None:
    together = read(detector, *SCENES.values())
    for scene, among in zip(SCENES.values(), together, strict=True):
        (alone,) = read(detector, scene)
        assert alone.names == among.names


def test_pictures_of_another_size_are_refused(detector: Detector) -> None:
    with pytest.raises(ValueError, match="expected pictures"):
        detector.read(np.zeros((1, 64, 64, 3), np.uint8))


@pytest.mark.parametrize("category", CATEGORIES)
def test_cases_follow_from_the_seed_and_keep_to_their_split(category: str) -> None:
    for split in CATEGORIES[category][1]:
        cases = cases_of(category, split, 20, 3)
        assert cases == cases_of(category, split, 20, 3)
        assert cases != cases_of(category, split, 20, 4)
        for case in cases:
            if category in UNRELATED:
                assert is_held_out_pair(*case.names) == (split == "held_out")
            elif split == "held_out" and case.relation not in ("right", "below", ""):
                pair = case.names[:2]
                assert is_held_out_pair(*pair) or is_held_out_relation(case.relation, *pair)


def drawn(scene: Scene) -> Reading:
    return Reading(tuple(Detection(**vars(placed), score=1.0) for placed in scene.objects), scene.background)


@pytest.mark.parametrize("relation", ["riding", "in", "front"])
def test_a_scene_shows_its_own_relation_and_no_other(relation: str) -> None:
    """What is far above another thing does not ride it, and who stands before a house is not in it."""
    rng = random.Random(3)
    for kind in ("pair", "riding", "in", "front"):
        for _ in range(200):
            scene = sample_scene(rng, kind, "any")
            case = replace(case_of_scene(scene), relation=relation)
            assert shows(drawn(scene), case) is (scene.relation == relation), scene
            assert not shows(drawn(scene), replace(case, names=case.names[::-1])), scene


@pytest.mark.parametrize(("kind", "turned"), [("looking", (False, True)), ("facing", (False, False, False, True))])
def test_who_looks_away_is_not_looking(kind: str, turned: tuple[bool, ...]) -> None:
    scene = sample_scene(random.Random(4), kind, "any")
    first, second = scene.objects
    looks = [(replace(first, flip=a), replace(second, flip=b)) for a in (False, True) for b in (False, True)]
    shown = [shows(drawn(replace(scene, objects=objects)), case_of_scene(scene)) for objects in looks]
    assert sorted(shown) == sorted(turned * (4 // len(turned)))
    assert shows(drawn(scene), case_of_scene(scene))


def test_prompts_are_plain_english() -> None:
    prompts = {case.prompt for category in CATEGORIES for case in cases_of(category, "trained", 40, 0)}
    assert any(prompt.startswith("two ") for prompt in prompts)
    assert any("looking in the mirror" in prompt for prompt in prompts)
    assert not any("{" in prompt or "  " in prompt for prompt in prompts)


TWO_CATS = Case("counting", "trained", "", ("cat",) * 2, "count")
LEFT_CASE = Case("position", "trained", "", ("duck", "turtle"), "left")


@pytest.mark.parametrize(
    ("case", "found", "is_right"),
    [
        (LEFT_CASE, reading(("duck", 0.3, 0.5, 0.4), ("turtle", 0.7, 0.5, 0.4)), True),
        (LEFT_CASE, reading(("duck", 0.7, 0.5, 0.4), ("turtle", 0.3, 0.5, 0.4)), False),
        (LEFT_CASE, reading(("duck", 0.3, 0.5, 0.4)), False),
        (LEFT_CASE, reading(("duck", 0.3, 0.2, 0.3), ("duck", 0.3, 0.8, 0.3), ("turtle", 0.7, 0.5, 0.4)), False),
        (LEFT_CASE, reading(("duck", 0.3, 0.5, 0.4), ("turtle", 0.7, 0.5, 0.4), ("sun", 0.5, 0.1, 0.1)), True),
        (LEFT_CASE, reading(("duck", 0.48, 0.3, 0.4), ("turtle", 0.52, 0.7, 0.4)), False),
        (TWO_CATS, reading(*[("cat", x, 0.5, 0.3) for x in (0.2, 0.5, 0.8)]), False),
        (TWO_CATS, reading(*[("cat", x, 0.5, 0.3) for x in (0.2, 0.5)], ("dog", 0.8, 0.5, 0.3)), True),
        (README_CASES[2], reading(("house of sushi", 0.5, 0.5, 0.8), ("dog", 0.5, 0.7, 0.4)), True),
        (README_CASES[2], reading(("house", 0.5, 0.5, 0.8), ("dog", 0.5, 0.7, 0.4)), False),
        (README_CASES[1], reading(("duck", 0.3, 0.5, 0.4), ("turtle", 0.7, 0.5, 0.4)), False),
    ],
)
def test_a_picture_shows_what_was_asked_or_not(case: Case, found: Reading, is_right: bool) -> None:
    assert shows(found, case) is is_right


def test_a_share_has_the_interval_of_wilson() -> None:
    low, high = Share(9, 10).interval
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert Share(0, 10).interval[0] == 0.0


def test_a_difference_of_shares_has_the_interval_of_newcombe() -> None:
    """The example of the paper, 56 of 70 and 48 of 80."""
    assert [round(value, 4) for value in difference(Share(56, 70), Share(48, 80))] == [0.2, 0.0524, 0.3339]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "lcm"])
def test_a_batch_has_the_pictures_that_the_engine_serves(tmp_path: Path, sampler: str) -> None:
    path = write_tiny_model(tmp_path, "sd1", seed=5)
    model = drawing.load(path, "cpu")
    sampling = drawing.Sampling(sampler, 4, 3.0)
    ours = drawing.draw(model, ["a cat", "a dog"], [3, 4], sampling, batch_size=2)
    for index, prompt in enumerate(("a cat", "a dog")):
        request = request_for(
            model, prompt=prompt, negative_prompt="", seed=3 + index, sampler=sampler, num_inference_steps=4,
            guidance_scale=3.0, sigma_schedule="simple", width=model.card.width, height=model.card.height,
        )  # fmt: skip
        images, _ = generate_images(model, request, load_settings(num_threads=1, dtype="fp32"))
        assert np.abs(pixels(images[0]) - ours[index].astype(int)).max() <= 1


def test_a_perfect_generator_scores_full_marks_and_a_blind_one_none(detector: Detector, tmp_path: Path) -> None:
    cases = {
        "a duck left of a turtle in a forest": Case("position", "trained", "1", ("duck", "turtle"), "left"),
        "an astronaut riding a horse": Case("riding", "trained", "2", ("astronaut", "horse"), "riding"),
    }
    answers = {"1": DUCK_AND_TURTLE, "2": RIDER}
    sampling = drawing.Sampling("dpmpp_2m", 1, 1.0)

    def perfect(prompts: list[str], *_: object) -> np.ndarray:
        return scene_pixels([answers[prompt] for prompt in prompts])

    def blind(prompts: list[str], *_: object) -> np.ndarray:
        return np.full((len(prompts), 64, 64, 3), 255, np.uint8)

    for draw, expected in ((perfect, Share(2, 2)), (blind, Share(0, 2))):
        judged = evaluate.judge(list(cases.values()), [0, 0], sampling, draw, detector)
        assert evaluate.share(judged) == expected
    evaluate.save_sheets(tmp_path, judged)
    with Image.open(tmp_path / "failures.png") as sheet:
        assert sheet.width > 2 * 128


def test_a_report_holds_what_was_measured(tmp_path: Path) -> None:
    sampling = drawing.Sampling("euler", 20, 3.0)
    report = evaluate.Report("emoji", "sha256:1", "a CPU", sampling, 0, 31.2)
    report.categories["two objects", "trained"], report.combinations["two objects", "trained"] = Share(9, 10), 7
    # All of 200 once had a bound a hair below the share, which no plot could be drawn of.
    report.steps = [(sampling.but(num_inference_steps=steps), Share(25 * steps, 200)) for steps in (4, 8)]
    report.guidance = [(sampling, Share(5, 10))]
    report.write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["categories"][0]["share"] == 0.9
    assert "90.0 % (59.6 to 98.2, 9 of 10); 7 combinations" in (tmp_path / "report.md").read_text()
    with Image.open(tmp_path / "steps.png") as plot:
        assert plot.width > 500


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["nowhere"], "nowhere is not a diffusers folder: it has no model_index.json"),
        (["model"], "training.json is missing: nothing tells which recipe's world these weights draw; name it with"),
        (["model", "--recipe", "small", "--samplers", "foo"], "sampler: got 'foo', expected one of"),
        (["model", "--recipe", "small", "--steps", "0"], "num_inference_steps: got 0, expected 1 to"),
        (["model", "--guidance", "1,x"], "argument --guidance: invalid numbers value: '1,x'"),
        ([], "a model's folder is needed, or --validate"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_once_and_an_earlier_report_stays(
    asked: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An unknown sampler was noticed when the sweep came to it, and the report of before was gone within a second."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model", "sd1", seed=5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("earlier")
    monkeypatch.setattr(evaluate, "Detector", lambda device: None)
    monkeypatch.setattr(sys, "argv", ["evaluate", *asked, "--out", "out", "--device", "cpu"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert told in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").read_text() == "earlier"


def test_validation_counts_what_was_read_wrong(detector: Detector) -> None:
    right = validation.is_read_right(reading(("duck", 0.3, 0.5, 0.4)), Scene((Placed("duck", 0.3, 0.5, 0.4),), "white"))
    wrong = validation.is_read_right(reading(("duck", 0.3, 0.5, 0.4)), Scene((Placed("cat", 0.3, 0.5, 0.4),), "white"))
    assert (right, wrong) == (True, False)
