"""What a prompt asks for, and whether a picture shows it, in the style of GenEval (Ghosh et al. 2023).

A `Case` is one prompt of one category. Cases are made from drawn scenes, so that they follow the world's own
frequencies and its held-out combinations; their words are fixed templates. Only what the category is about is judged.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations

from training.captions import PLACE_PHRASES, plural, with_article
from training.detector import Detection, Reading
from training.world import FULL, PLACES, Scene, Split, World, is_held_out_pair, sample_scene

# Between the centres, as a share of the picture, before one object is left of or above another.
APART = 0.1
# Centres of two that touch are nearer than this share of their sizes together; what stands apart is farther.
TOUCHING = 0.45
# What is in something has its centre no further from the other's than this share of its size; what stands before it is
# further down.
INSIDE = 1 / 3
NUMBERS = {2: "two", 3: "three", 4: "four"}
UNCOUNTED_FOODS = ("sushi", "pizza", "cheese")


@dataclass(frozen=True)
class Case:
    """A prompt and what its picture must show: `names` of `world.SPRITES` in the relation's order, a background or
    None where any will do."""

    category: str
    split: Split
    prompt: str
    names: tuple[str, ...]
    relation: str = ""
    background: str | None = None

    @property
    def asked(self) -> tuple[object, ...]:
        """What must be there, whatever the words."""
        return self.names, self.relation, self.background


README_CASES = tuple(
    Case("README", "trained", prompt, names, background=background)
    for prompt, names, background in (
        ("an astronaut riding a horse", ("astronaut", "horse"), None),
        ("a duck arguing with a turtle in a forest", ("duck", "turtle"), "forest"),
        ("a corgi in a house made of sushi", ("dog", "house", "sushi"), None),
        ("a dog looking in the mirror seeing a cat", ("dog", "cat", "mirror"), None),
        ("An astronaut riding a horse in photorealistic style.", ("astronaut", "horse"), None),
        (
            "A chrome-plated duck with a golden beak arguing with an angry turtle in a forest.",
            ("duck", "turtle"),
            "forest",
        ),
        ("A cute corgi lives in a house made out of sushi.", ("dog", "house", "sushi"), None),
        ("A dog looking curiously in the mirror, seeing a cat.", ("dog", "cat", "mirror"), None),
    )
)
"""The prompts that the field is introduced with, plain and literal."""

# Category -> kind of scene and the splits that it has.
CATEGORIES: dict[str, tuple[str, tuple[Split, ...]]] = {
    "single object": ("single", ("trained",)),
    "two objects": ("pair", ("trained", "held_out")),
    "counting": ("count", ("trained",)),
    "position": ("pair", ("trained", "held_out")),
    "colour": ("shape", ("trained",)),
    "two colours": ("shape", ("trained", "held_out")),
    "background": ("single", ("trained",)),
    "riding": ("riding", ("trained", "held_out")),
    "in": ("in", ("trained", "held_out")),
    "in front": ("front", ("trained", "held_out")),
    "looking": ("looking", ("trained", "held_out")),
    "facing": ("facing", ("trained", "held_out")),
    "mirror": ("mirror", ("trained", "held_out")),
    "made of": ("made", ("trained",)),
}
# Categories of two things in no relation.
UNRELATED = ("two objects", "two colours")
TEMPLATES = {
    "left": "{} left of {}",
    "right": "{} right of {}",
    "above": "{} above {}",
    "below": "{} below {}",
    "riding": "{} riding {}",
    "in": "{} in {}",
    "front": "{} in front of {}",
    "looking": "{} looking at {}",
    "facing": "{} facing {}",
}
_REVERSED = {"left": "right", "above": "below"}


def cases_of(category: str, split: Split, count: int, seed: int, world: World = FULL) -> list[Case]:
    """`count` cases of a category in a world, the same for the same seed. Raises `KeyError` on an unknown category."""
    kind, _ = CATEGORIES[category]
    rng = random.Random(f"cases-{seed}-{category}-{split}")
    cases: list[Case] = []
    while len(cases) < count:
        scene = sample_scene(rng, kind, "any" if category in UNRELATED else split, world)
        case = _case(category, split, scene, rng)
        if case is not None:
            cases.append(case)
    return cases


def _case(category: str, split: Split, scene: Scene, rng: random.Random) -> Case | None:
    """A case from a scene; None where the scene does not suit the category."""
    names, relation = tuple(placed.name for placed in scene.objects), scene.relation
    if category == "background":
        place = background_phrase(scene.background)
        return Case(category, split, f"{noun(names[0])} {place}", (), background=scene.background)
    if category in ("colour", "two colours") and len(names) != (1 if category == "colour" else 2):
        return None
    if category in UNRELATED:
        # A relation that was held out is no matter where none is asked for.
        if is_held_out_pair(*names) != (split == "held_out"):
            return None
        relation = ""
    elif category == "position" and rng.random() < 0.5:
        names, relation = names[::-1], _REVERSED[relation]
    words = said(names, relation)
    if scene.background in PLACES:
        words = f"{words} {background_phrase(scene.background)}"
    return Case(category, split, words, names, relation)


def noun(name: str) -> str:
    """A sprite's name with an article."""
    if name.startswith("house of "):
        food = name.removeprefix("house of ")
        return f"a house made of {food if food in UNCOUNTED_FOODS else plural(food)}"
    return with_article(name)


def background_phrase(background: str) -> str:
    """Words for one of `world.BACKGROUNDS`."""
    return PLACE_PHRASES[background][0] if background in PLACES else f"on a {background} background"


def said(names: tuple[str, ...], relation: str) -> str:
    """The objects and how they stand in plain words."""
    if relation == "count":
        return f"{NUMBERS[len(names)]} {plural(names[0])}"
    if relation == "mirror":
        looker = f"{noun(names[0])} looking in the mirror"
        return looker if names[0] == names[1] else f"{looker} seeing {noun(names[1])}"
    if not relation:
        return " and ".join(noun(name) for name in names)
    return TEMPLATES[relation].format(*(noun(name) for name in names))


def shows(reading: Reading, case: Case) -> bool:
    """Whether the picture that was read so shows what the case asks for: each thing that is named as often as it is
    named, which is stricter than GenEval is. What is not named is no matter."""
    if case.background is not None and reading.background != case.background:
        return False
    shown = Counter(things(reading))
    if any(shown[name] != number for name, number in Counter(case.names).items()):
        return False
    if case.relation in ("", "count"):
        return True
    judge = _JUDGES[case.relation]
    return any(
        all(_is(detection, name) for detection, name in zip(chosen, case.names, strict=True)) and judge(*chosen)
        for chosen in permutations(reading.detections, len(case.names))
    )


def things(reading: Reading) -> Iterable[str]:
    """The names of what is shown; a house of sushi is a house, sushi, and a house of sushi."""
    for name in reading.names:
        yield name
        if name.startswith("house of "):
            yield "house"
            yield name.removeprefix("house of ")


def case_of_scene(scene: Scene) -> Case:
    """What a picture of exactly this scene shows."""
    names = tuple(placed.name for placed in scene.objects)
    return Case("", "any", "", names, scene.relation, scene.background)


def _is(detection: Detection, name: str) -> bool:
    return detection.name == name or (name == "house" and detection.name.startswith("house of "))


def _is_left(a: Detection, b: Detection) -> bool:
    return b.x - a.x >= APART


def _is_above(a: Detection, b: Detection) -> bool:
    return b.y - a.y >= APART


def _touch(a: Detection, b: Detection) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) <= TOUCHING * (a.size + b.size)


def _is_riding(a: Detection, b: Detection) -> bool:
    return a.size < b.size and _is_above(a, b) and abs(a.x - b.x) <= b.size / 2 and _touch(a, b)


def _is_in(a: Detection, b: Detection) -> bool:
    return a.size < b.size and max(abs(a.x - b.x), abs(a.y - b.y)) <= INSIDE * b.size


def _is_in_front(a: Detection, b: Detection) -> bool:
    return a.size < b.size and a.y - b.y > INSIDE * b.size and _touch(a, b)


def _looks_at(a: Detection, b: Detection) -> bool:
    """Glyphs of animals face left unless mirrored. Two that are there look so by chance in half of all pictures."""
    return a.flip == (b.x > a.x)


def _faces(a: Detection, b: Detection) -> bool:
    return _looks_at(a, b) and _looks_at(b, a)


def _sees_in_mirror(looker: Detection, seen: Detection, mirror: Detection) -> bool:
    return _is_in(seen, mirror) and abs(seen.x - mirror.x) < abs(looker.x - mirror.x)


_JUDGES: dict[str, Callable[..., bool]] = {
    "left": _is_left,
    "right": lambda a, b: _is_left(b, a),
    "above": _is_above,
    "below": lambda a, b: _is_above(b, a),
    "riding": _is_riding,
    "in": _is_in,
    "front": _is_in_front,
    "looking": _looks_at,
    "facing": _faces,
    "mirror": _sees_in_mirror,
}
