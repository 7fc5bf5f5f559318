"""The drawn world, its words, what training reads of them, and the model that ships with the server."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from darkroom.config import BUILTIN_MODEL, builtin_models
from safetensors import safe_open
from transformers import CLIPTokenizer

from training import common, contact_sheet, export, painting, train_unet, world
from training.captions import PLACE_PHRASES, caption, plural
from training.judging import CATEGORIES, cases_of
from training.recipes import RECIPES, Recipe, recipe_of
from training.scenes import NUM_CLASSES, answers, make_scenes
from training.tokenizer import MAX_TOKENS, build_tokenizer, tokenize

SENTENCES = (
    "An astronaut riding a horse in photorealistic style.",
    "A chrome-plated duck with a golden beak arguing with an angry turtle in a forest.",
    "A cute corgi lives in a house made out of sushi.",
    "A dog looking curiously in the mirror, seeing a cat.",
)


def told(index: int) -> tuple[world.Scene, str]:
    scene = world.scene_at(7, index)
    return scene, caption(scene, random.Random(index))


def test_the_same_seed_gives_the_same_scene_picture_and_caption() -> None:
    for index in range(20):
        assert told(index) == told(index)
        first, second = (np.asarray(painting.render(told(index)[0])) for _ in range(2))
        assert np.array_equal(first, second)


def test_other_scenes_of_a_series_differ() -> None:
    assert len({told(index)[0] for index in range(50)}) == 50


def test_the_world_is_as_large_as_it_says() -> None:
    assert len(world.OBJECTS) >= 64
    assert len(world.PLACES) >= 8
    shown = {scene.relation for scene in (world.scene_at(7, index) for index in range(2000))}
    assert shown == set(world.RELATIONS)


def test_every_object_and_every_background_appears_in_captions() -> None:
    captions = " | ".join(told(index)[1].lower() for index in range(6000))
    for name in (*world.OBJECTS, *world.BACKGROUNDS):
        words = PLACE_PHRASES.get(name, (name,))
        assert any(word in captions for word in words), name


@pytest.mark.parametrize("name", sorted(world.OBJECTS))
def test_each_glyph_is_one_coloured_picture(name: str) -> None:
    """A font without the joined astronaut would draw two glyphs side by side, about twice as wide as high."""
    picture = painting.glyph(name)
    assert picture.width < 1.9 * picture.height
    pixels = np.asarray(picture)[np.asarray(picture)[..., 3] > 200][:, :3]
    assert len(np.unique(pixels // 32, axis=0)) > 4


def test_objects_lie_inside_the_picture() -> None:
    for index in range(500):
        for placed in told(index)[0].objects:
            half = placed.size / 2
            assert min(placed.x, placed.y) - half > -0.1
            assert max(placed.x, placed.y) + half < 1.02


def test_left_of_means_a_smaller_x_and_above_and_riding_a_smaller_y() -> None:
    for index in range(500):
        scene = told(index)[0]
        if scene.relation == "left":
            assert scene.objects[0].x < scene.objects[1].x
        elif scene.relation in ("above", "riding"):
            assert scene.objects[0].y < scene.objects[1].y


def test_who_looks_at_something_faces_it() -> None:
    rng = random.Random(1)
    for kind in ("looking", "facing"):
        for _ in range(50):
            first, second = world.sample_scene(rng, kind).objects
            assert first.flip == (first.x < second.x)
            assert kind == "looking" or second.flip == (second.x < first.x)


def test_where_no_place_is_said_whoever_is_named_first_stands_on_the_left() -> None:
    dog, horse = world.Placed("dog", 0.25, 0.5, 0.4), world.Placed("horse", 0.75, 0.5, 0.4)
    scene = world.Scene((dog, horse), "white", "left")
    captions = [caption(scene, random.Random(index)).lower() for index in range(300)]
    bare = [text for text in captions if "left" not in text and "right" not in text]
    assert len(bare) > 60
    for text in bare:
        first, second = (
            min(text.find(word) for word in world.OBJECTS[name][1] if word in text) for name in ("dog", "horse")
        )
        assert first < second, text


@pytest.mark.parametrize("part", [world.SMALL, world.FULL], ids=["small", "full"])
def test_training_never_shows_what_evaluation_asks_for_as_held_out(part: world.World) -> None:
    """Neither by a third object (a mirror), nor by another name (a house of pizza is a house), nor in another order."""
    pairs: set[frozenset[str]] = set()
    relations: set[tuple[str, ...]] = set()
    for index in range(20_000):
        scene = world.scene_at(0, index, world=part)
        names = [placed.name for placed in scene.objects]
        for first, second in itertools.combinations(names, 2):
            pairs |= {frozenset(pair) for pair in itertools.product(things_of(first), things_of(second))}
        if len(names) > 1:
            for first, second in itertools.product(things_of(names[0]), things_of(names[1])):
                relations.add((scene.relation, first, second))
                if scene.relation in ("looking", "facing") and second in world.LOOKERS:
                    # The picture is the same, whoever is said to look.
                    relations |= {
                        (word, *order) for word in ("looking", "facing") for order in ((first, second), (second, first))
                    }
    for category, (_, splits) in CATEGORIES.items():
        for case in cases_of(category, "held_out", 100, 0, part) if "held_out" in splits else ():
            first, second = case.names[:2]
            asked = {"right": ("left", second, first), "below": ("above", second, first)}.get(
                case.relation, (case.relation, first, second)
            )
            assert frozenset((first, second)) not in pairs or (case.relation and asked not in relations), case


def things_of(name: str) -> set[str]:
    return {name, "house", name.removeprefix("house of ")} if name.startswith("house of ") else {name}


def test_a_held_out_pair_is_held_out_in_either_order() -> None:
    names = tuple(world.OBJECTS)
    held = [(a, b) for a in names for b in names if a < b and world.is_held_out_pair(a, b)]
    assert 0.05 < len(held) / (len(names) * (len(names) - 1) / 2) < 0.15
    assert all(world.is_held_out_pair(b, a) for a, b in held)


def test_a_painter_paints_the_same_bytes_as_one_picture_at_a_time() -> None:
    scenes = [world.scene_at(3, index) for index in range(24)]
    layers, backgrounds = painting.pack_layers(scenes)
    painter = painting.Painter(torch.device("cpu"))
    painted = painter.paint(torch.from_numpy(layers), torch.from_numpy(backgrounds))
    assert np.array_equal(painted.numpy(), painting.scene_pixels(scenes))


def test_the_answers_about_a_scene_are_classes_that_there_are() -> None:
    told_of = np.array([answers(world.scene_at(5, index)) for index in range(2000)])
    assert (told_of >= 0).all()
    assert (told_of < np.array(NUM_CLASSES)).all()


def test_several_of_a_thing_are_named_in_the_plural() -> None:
    assert [plural(noun) for noun in ("dog", "puppy", "fox", "fish", "red circle")] == [
        "dogs",
        "puppies",
        "foxes",
        "fish",
        "red circles",
    ]


def test_the_small_world_is_a_part_of_the_full_one_and_lies_on_its_grid() -> None:
    small = world.SMALL
    assert set(small.objects) < set(world.OBJECTS)
    sprites = {*small.objects, *small.shape_names, *small.made_names}
    assert sprites < set(world.SPRITES)
    shown = [placed for index in range(500) for placed in world.scene_at(7, index, world=small).objects]
    assert {placed.name for placed in shown} == sprites
    for placed in shown:
        cells = [value / small.grid for value in (placed.x, placed.y, placed.size)]
        assert cells == [round(cell) for cell in cells], placed


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_training_sees_the_pictures_of_its_world(recipe: Recipe) -> None:
    scenes = make_scenes(recipe.world, 3, 4)
    pictures = common.to_pixels(scenes.pictures(painting.Painter(torch.device("cpu")), torch.arange(4)))
    drawn = [world.scene_at(3, index, world=recipe.world) for index in range(4)]
    expected = painting.scene_pixels(drawn, recipe.world.image_px)
    assert pictures.shape == (4, recipe.world.image_px, recipe.world.image_px, 3)
    assert np.abs(pictures.astype(int) - expected).max() <= 1


def test_prompts_that_show_a_model_off_name_what_the_small_world_holds_too() -> None:
    others = {phrase for name in set(world.OBJECTS) - set(world.SMALL.objects) for phrase in world.OBJECTS[name][1]}
    for prompt in (*export.EXAMPLES, *contact_sheet.PROMPTS, *train_unet.PROMPTS):
        assert not others & {*prompt.split(), *(plural(word) for word in prompt.split())}, prompt


def test_a_model_tells_the_recipe_that_made_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.json is missing"):
        recipe_of(tmp_path)
    (tmp_path / "training.json").write_text(json.dumps({"unet": {"recipe": "small"}}))
    assert recipe_of(tmp_path) is RECIPES["small"]


@pytest.mark.parametrize("small", [True, False], ids=["small", "full"])
def test_no_caption_is_cut_and_ids_are_those_of_the_tokenizer_itself(small: bool) -> None:
    tokenizer = build_tokenizer(world.SMALL if small else world.FULL)
    captions = [told(index)[1] for index in range(1000)] + [*SENTENCES, ""]
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    assert max(lengths) <= MAX_TOKENS
    expected = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenize(tokenizer, captions), expected)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(BUILTIN_MODEL / "tokenizer")


@pytest.mark.parametrize("text", ["", "a dog", "Zebra!? 42", "日本の猫 🤖", "naïve\tcafé\n", "x" * 500])
def test_the_shipped_tokenizer_covers_any_text(tokenizer: CLIPTokenizer, text: str) -> None:
    """The unknown token is the end mark, so it may stand only where a text ends."""
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]


def test_the_shipped_models_are_safetensors_only_and_small() -> None:
    """What a student shares with its teacher is linked, and counts once."""
    files = {path.resolve() for model in builtin_models() for path in model.rglob("*") if path.is_file()}
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert sum(path.stat().st_size for path in files) <= 40e6


def test_no_folder_of_a_shipped_model_is_a_link() -> None:
    """A wheel takes in what a link to a file points to, and leaves out a folder that is a link."""
    assert not [path for model in builtin_models() for path in model.rglob("*") if path.is_dir() and path.is_symlink()]


@pytest.mark.parametrize("model", builtin_models(), ids=lambda model: model.name)
def test_the_shipped_weights_are_finite_halves(model: Path) -> None:
    for part in ("vae", "unet", "text_encoder"):
        (path,) = (model / part).glob("*.safetensors")
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                assert tensor.dtype == np.float16, name
                assert np.isfinite(tensor).all(), name


@pytest.mark.parametrize("model", builtin_models(), ids=lambda model: model.name)
def test_the_serving_settings_name_prompts_from_the_world(model: Path) -> None:
    settings = json.loads((model / "darkroom.json").read_text())
    assert settings["id"] == model.name
    assert settings["width"] % 8 == settings["height"] % 8 == 0
    for prompt in settings["example_prompts"]:
        assert any(name in prompt for name in (*world.OBJECTS, *world.SHAPE_NAMES)), prompt
