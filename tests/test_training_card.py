"""The model card: written from what training and evaluation recorded, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from darkroom.diffusion.loader import read_card

from tests.support.tiny_models import write_tiny_model
from training.card import write_cards
from training.drawing import Sampling
from training.evaluate import Report
from training.export import STUDENT, TEACHER
from training.figures import Share
from training.judging import README_CASES
from training.world import SMALL

RUN = {"recipe": "small", "parameters": 1234567, "updates": 10, "minutes": 2.4, "device": "one test card", "loss": 0.25}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A teacher and a student that were trained, and a model that this recipe did not make."""
    for seed, serving in enumerate((TEACHER, STUDENT, {"id": "another"})):
        folder = write_tiny_model(tmp_path / "models" / serving["id"], "sd1", seed=seed)
        (folder / "darkroom.json").write_text(json.dumps(serving | {"width": 64, "height": 64}))
    record = {"text": RUN, "vae": RUN | {"psnr_db": 31.25}, "unet": RUN}
    (tmp_path / "models" / "emoji-world" / "training.json").write_text(json.dumps(record))
    (tmp_path / "models" / "emoji-world-4step" / "training.json").write_text(json.dumps(record | {"student": RUN}))
    return tmp_path / "models"


def report_of(folder: Path, serving: dict[str, Any]) -> Report:
    sampling = Sampling(serving["sampler"], serving["num_inference_steps"], serving["guidance_scale"])
    return Report(serving["id"], read_card(folder).weights_hash, "a test card in float16", sampling, seed=0)


def evaluated(models: Path) -> Path:
    """Reports of both models, whose teacher misses one aim. Returns their folder."""
    teacher = report_of(models / "emoji-world", TEACHER)
    teacher.vae_psnr_db = 31.3
    for category, passed in {"single object": 96, "two objects": 88, "position": 84, "background": 99}.items():
        teacher.categories[category, "trained"] = Share(passed, 100)
    teacher.categories["two objects", "held_out"] = Share(80, 100)
    teacher.combinations = dict.fromkeys(teacher.categories, 12)
    teacher.readme = {case.prompt: Share(9, 10) for case in README_CASES}
    teacher.steps = [(teacher.sampling.but(num_inference_steps=25), Share(180, 200))]
    student = report_of(models / "emoji-world-4step", STUDENT)
    student.steps = [(student.sampling, Share(150, 200))]
    reports = models.parent / "reports"
    for report in (teacher, student):
        (reports / report.model).mkdir(parents=True)
        report.write(reports / report.model)
    return reports


def line_with(card: str, words: str) -> str:
    (line,) = (line for line in card.splitlines() if words in line)
    return line


def test_a_card_sets_what_was_measured_against_the_aims(models: Path) -> None:
    teacher, student = (path.read_text() for path in write_cards(models, evaluated(models)))
    assert line_with(teacher, "Single object | at least").endswith("| 96.0 % (90.2 to 98.4, 96 of 100) | met |")
    assert line_with(teacher, "Position | at least").endswith("84 of 100) | missed |")
    assert "| 8.0 points (-2.3 to 18.2): 88.0 %" in line_with(teacher, "Two objects, trained before held-out pairs")
    assert line_with(teacher, "Autoencoder on held-out scenes").endswith("| 31.3 dB | met |")
    for case in README_CASES:
        assert line_with(teacher, f"*{case.prompt}*").endswith("| 9 of 10 | met |")
    assert line_with(student, "Teacher at 25 steps").endswith("150 of 200) | missed |")
    assert "15.0 points" in student


def test_a_card_tells_how_each_stage_was_trained(models: Path) -> None:
    teacher, student = (path.read_text() for path in write_cards(models, models))
    assert line_with(teacher, "| parameters") == "| parameters | 1,234,567 | 1,234,567 | 1,234,567 |"
    assert line_with(teacher, "PSNR on held-out scenes while") == (
        "| PSNR on held-out scenes while training, dB | - | 31.25 | - |"
    )
    assert "trained for 7.2 minutes" in teacher
    assert "trained for 9.6 minutes" in student
    assert '"--recipe small"`, which trains for 210 minutes' in student


def test_a_run_that_went_on_in_another_way_is_told_in_its_parts(models: Path) -> None:
    path = models / "emoji-world" / "training.json"
    record = json.loads(path.read_text())
    record["vae"] |= {"decoder_only": True, "lr": 5e-3, "before": [RUN | {"updates": 9000, "minutes": 2.1, "lr": 1e-3}]}
    path.write_text(json.dumps(record))
    teacher, _ = (path.read_text() for path in write_cards(models, models))
    assert line_with(teacher, "| the decoder alone") == "| the decoder alone | - | yes | - |"
    assert line_with(teacher, "Other options").startswith(
        "Other options for the first 9,000 updates (2.1 minutes) of the autoencoder: highest learning rate 0.001, "
        "the decoder alone no."
    )


def test_a_student_is_set_against_its_teacher_on_the_same_prompts_alone(models: Path) -> None:
    reports = evaluated(models)
    path = reports / "emoji-world-4step" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 1}))
    with pytest.raises(ValueError, match="evaluate both with the same"):
        write_cards(models, reports)


def test_a_card_lists_what_the_recipe_s_world_holds_and_nothing_else(models: Path) -> None:
    teacher, _ = (path.read_text() for path in write_cards(models, models))
    assert line_with(teacher, "- Objects:") == f"- Objects: {', '.join(SMALL.objects)}."
    assert line_with(teacher, "- Colours of shapes:") == "- Colours of shapes: red, yellow, green, blue, purple."
    assert "64 x 64 px only" in teacher


def test_what_nobody_measured_is_said_to_be_so(models: Path) -> None:
    teacher, student = (path.read_text() for path in write_cards(models, models))
    assert "| not measured yet | - |" in line_with(teacher, "Single object | at least")
    assert "| not measured yet | - |" in line_with(student, "Teacher at 25 steps")
    assert " met |" not in teacher + student


def test_a_report_of_other_weights_is_refused(models: Path) -> None:
    reports = evaluated(models)
    path = reports / "emoji-world" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_hash": "of others"}))
    with pytest.raises(ValueError, match="other weights"):
        write_cards(models, reports)


def test_a_model_of_another_recipe_keeps_its_card(models: Path) -> None:
    assert [path.parent.name for path in write_cards(models, models)] == ["emoji-world", "emoji-world-4step"]
    assert not (models / "another" / "README.md").exists()
