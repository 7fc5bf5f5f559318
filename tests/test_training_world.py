"""The drawn world, its words, and the model that ships with the server."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from transformers import CLIPTokenizer

from training import world

MODEL = Path(__file__).parents[1] / "server" / "darkroom" / "models" / "emoji-world"


def told(index: int) -> tuple[world.Scene, str]:
    scene = world.scene_at(7, index)
    return scene, world.caption(scene, random.Random(index))


def test_the_same_seed_gives_the_same_scene_picture_and_caption() -> None:
    for index in range(20):
        assert told(index) == told(index)
        first, second = (np.asarray(world.render(told(index)[0])) for _ in range(2))
        assert np.array_equal(first, second)


def test_other_scenes_of_a_series_differ() -> None:
    assert len({told(index)[0] for index in range(50)}) == 50


def test_every_object_and_every_background_appears_in_captions() -> None:
    captions = " | ".join(told(index)[1] for index in range(3000))
    for name in (*world.OBJECTS, *world.BACKGROUNDS):
        words = world.PLACES.get(name, (name,))
        assert any(word in captions for word in words), name


@pytest.mark.parametrize("name", sorted(world.OBJECTS))
def test_each_glyph_is_one_coloured_picture(name: str) -> None:
    """A font without the joined astronaut would draw two glyphs side by side, about twice as wide as high."""
    picture = world.glyph(name)
    assert picture.width < 1.9 * picture.height
    colours = np.asarray(picture)[np.asarray(picture)[..., 3] > 200][:, :3]
    assert np.ptp(colours.astype(int), axis=1).max() > 40 or name == "robot"


def test_objects_lie_inside_the_picture() -> None:
    for index in range(300):
        for placed in told(index)[0].objects:
            half = placed.size / 2
            assert min(placed.x, placed.y) - half > -0.1
            assert max(placed.x, placed.y) + half < 1.02


def test_left_of_means_a_smaller_x_and_above_a_smaller_y() -> None:
    for index in range(300):
        scene = told(index)[0]
        if scene.relation == "left":
            assert scene.objects[0].x < scene.objects[1].x
        elif scene.relation:
            assert scene.objects[0].y < scene.objects[1].y


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MODEL / "tokenizer")


@pytest.mark.parametrize("text", ["", "a dog", "Zebra!? 42", "日本の猫 🤖", "naïve\tcafé\n", "x" * 500])
def test_the_shipped_tokenizer_covers_any_text(tokenizer: CLIPTokenizer, text: str) -> None:
    """The unknown token is the end mark, so it may stand only where a text ends."""
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]


def test_captions_fit_the_text_length_without_cutting(tokenizer: CLIPTokenizer) -> None:
    assert max(len(tokenizer(told(index)[1]).input_ids) for index in range(1000)) <= tokenizer.model_max_length


def test_the_shipped_model_is_safetensors_only_and_small() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert sum(path.stat().st_size for path in files) <= 30 * 2**20


def test_the_shipped_weights_are_finite_halves() -> None:
    for part in ("vae", "unet", "text_encoder"):
        (path,) = (MODEL / part).glob("*.safetensors")
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                assert tensor.dtype == np.float16, name
                assert np.isfinite(tensor).all(), name


def test_the_serving_settings_name_prompts_from_the_world() -> None:
    settings = json.loads((MODEL / "darkroom.json").read_text())
    assert settings["id"] == "emoji-world"
    assert settings["width"] % 8 == settings["height"] % 8 == 0
    for prompt in settings["example_prompts"]:
        assert any(name in prompt for name in world.OBJECTS), prompt
