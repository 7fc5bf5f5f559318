"""Emoji world: what there is and where it stands. Words for it are in `captions.py`, its pictures in `painting.py`.

Everything follows from a seed: `scene_at(seed, index)` is one scene of an endless series. Scenes with two objects leave
out the pairs for which `is_held_out_pair` is true, and relations those of `is_held_out_relation`, so that evaluation
can ask for what training never showed. The glyphs come from Noto Color Emoji (SIL OFL 1.1).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

IMAGE_PX = 128

# name -> (glyph, noun phrases without an article)
OBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "astronaut": ("\U0001f9d1\u200d\U0001f680", ("astronaut", "astronaut", "spaceman", "cosmonaut")),
    "horse": ("\U0001f40e", ("horse", "horse", "brown horse", "pony")),
    "duck": ("\U0001f986", ("duck", "duck", "mallard")),
    "turtle": ("\U0001f422", ("turtle", "turtle", "green turtle", "tortoise")),
    "dog": ("\U0001f415", ("dog", "dog", "puppy", "corgi")),
    "cat": ("\U0001f408", ("cat", "cat", "orange cat", "kitten")),
    "house": ("\U0001f3e0", ("house", "house", "home", "cottage")),
    "sushi": ("\U0001f363", ("sushi", "sushi", "piece of sushi", "plate of sushi")),
    "tree": ("\U0001f333", ("tree", "tree", "green tree", "oak")),
    "rocket": ("\U0001f680", ("rocket", "rocket", "space rocket", "spaceship")),
    "apple": ("\U0001f34e", ("apple", "apple", "red apple")),
    "banana": ("\U0001f34c", ("banana", "banana", "yellow banana")),
    "car": ("\U0001f697", ("car", "car", "red car", "automobile")),
    "fish": ("\U0001f420", ("fish", "fish", "yellow fish", "tropical fish")),
    "butterfly": ("\U0001f98b", ("butterfly", "butterfly", "orange butterfly")),
    "mushroom": ("\U0001f344", ("mushroom", "mushroom", "red mushroom", "toadstool")),
    "pizza": ("\U0001f355", ("pizza", "pizza", "slice of pizza")),
    "penguin": ("\U0001f427", ("penguin", "penguin")),
    "frog": ("\U0001f438", ("frog", "frog", "green frog", "toad")),
    "robot": ("\U0001f916", ("robot", "robot", "grey robot", "android")),
    "elephant": ("\U0001f418", ("elephant", "elephant", "grey elephant")),
    "pig": ("\U0001f416", ("pig", "pig", "piglet")),
    "rabbit": ("\U0001f407", ("rabbit", "rabbit", "bunny", "hare")),
    "whale": ("\U0001f433", ("whale", "whale", "blue whale")),
    "snail": ("\U0001f40c", ("snail", "snail")),
    "bee": ("\U0001f41d", ("bee", "bee", "honeybee")),
    "owl": ("\U0001f989", ("owl", "owl", "brown owl")),
    "fox": ("\U0001f98a", ("fox", "fox", "red fox")),
    "lion": ("\U0001f981", ("lion", "lion")),
    "panda": ("\U0001f43c", ("panda", "panda", "panda bear")),
    "octopus": ("\U0001f419", ("octopus", "octopus", "pink octopus")),
    "crab": ("\U0001f980", ("crab", "crab", "red crab")),
    "dinosaur": ("\U0001f995", ("dinosaur", "dinosaur", "green dinosaur", "sauropod")),
    "unicorn": ("\U0001f984", ("unicorn", "unicorn", "white unicorn")),
    "parrot": ("\U0001f99c", ("parrot", "parrot", "green parrot")),
    "cow": ("\U0001f404", ("cow", "cow")),
    "sheep": ("\U0001f411", ("sheep", "sheep", "white sheep", "lamb")),
    "ladybug": ("\U0001f41e", ("ladybug", "ladybug", "ladybird", "beetle")),
    "ghost": ("\U0001f47b", ("ghost", "ghost", "white ghost")),
    "snowman": ("\u26c4", ("snowman", "snowman")),
    "doughnut": ("\U0001f369", ("doughnut", "donut", "doughnut")),
    "hamburger": ("\U0001f354", ("hamburger", "burger", "hamburger")),
    "ice cream": ("\U0001f366", ("ice cream", "ice cream", "ice cream cone")),
    "strawberry": ("\U0001f353", ("strawberry", "strawberry", "red strawberry")),
    "watermelon": ("\U0001f349", ("watermelon", "watermelon", "slice of watermelon")),
    "carrot": ("\U0001f955", ("carrot", "carrot", "orange carrot")),
    "cake": ("\U0001f382", ("cake", "cake", "birthday cake")),
    "cheese": ("\U0001f9c0", ("cheese", "cheese", "piece of cheese")),
    "pineapple": ("\U0001f34d", ("pineapple", "pineapple")),
    "mirror": ("\U0001fa9e", ("mirror", "mirror")),
    "bicycle": ("\U0001f6b2", ("bicycle", "bicycle", "bike")),
    "boat": ("\u26f5", ("boat", "boat", "sailboat", "ship")),
    "train": ("\U0001f682", ("train", "train", "steam train", "locomotive")),
    "airplane": ("\u2708\ufe0f", ("airplane", "airplane", "plane", "aeroplane")),
    "guitar": ("\U0001f3b8", ("guitar", "guitar", "electric guitar")),
    "umbrella": ("\u2602\ufe0f", ("umbrella", "umbrella", "purple umbrella")),
    "clock": ("\u23f0", ("clock", "clock", "alarm clock")),
    "ball": ("\u26bd", ("ball", "ball", "football", "soccer ball")),
    "balloon": ("\U0001f388", ("balloon", "balloon", "red balloon")),
    "crown": ("\U0001f451", ("crown", "crown", "golden crown")),
    "castle": ("\U0001f3f0", ("castle", "castle", "stone castle")),
    "bathtub": ("\U0001f6c1", ("bathtub", "bathtub", "bath")),
    "cactus": ("\U0001f335", ("cactus", "cactus", "green cactus")),
    "sunflower": ("\U0001f33b", ("sunflower", "sunflower")),
    "gift": ("\U0001f381", ("gift", "gift", "present")),
    "camera": ("\U0001f4f7", ("camera", "camera")),
}
RIDERS = ("astronaut", "robot", "frog", "penguin", "duck", "cat", "dog", "rabbit", "panda", "ghost", "owl", "lion")
MOUNTS = ("horse", "turtle", "dog", "cat", "car", "fish", "rocket", "elephant", "pig", "cow", "bicycle", "dinosaur")
# They face left in the font, so a mirrored glyph looks to the right.
LOOKERS = (
    "dog", "cat", "horse", "duck", "turtle", "penguin", "rabbit", "elephant", "pig", "sheep", "cow", "parrot", "snail",
    "dinosaur", "fish",
)  # fmt: skip
CONTAINERS = ("house", "castle", "boat", "bathtub", "car")
DWELLERS = ("dog", "cat", "duck", "frog", "rabbit", "penguin", "panda", "robot", "ghost", "owl", "fox", "astronaut")
MATERIALS = ("sushi", "pizza", "banana", "apple", "doughnut", "strawberry", "cheese", "carrot")
# Large enough to stand behind somebody.
BACKDROPS = ("tree", "house", "castle", "rocket", "car", "train", "boat", "elephant", "cactus")

Colour = tuple[int, int, int]
SHAPES = ("circle", "square", "triangle", "star", "heart")
COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 32),
    "yellow": (246, 208, 48),
    "green": (44, 150, 68),
    "blue": (44, 96, 214),
    "purple": (134, 60, 176),
    "brown": (126, 78, 44),
    "black": (28, 28, 30),
}
PLAIN: dict[str, Colour] = {
    "white": (250, 250, 250),
    "blue": (150, 200, 245),
    "pink": (250, 190, 210),
    "yellow": (250, 232, 150),
    "green": (175, 225, 170),
    "purple": (205, 185, 240),
}
PLACES: tuple[str, ...] = ("forest", "night", "beach", "snow", "desert", "city", "sea", "meadow", "mountains")
BACKGROUNDS: tuple[str, ...] = (*PLACES, *PLAIN)

# Of two that look at each other, or one at the other, or stand one before the other, where the caption says no side.
# Were either side as likely, the two halves of a picture would each choose for themselves, and often draw the same
# object twice.
NAMED_FIRST_ON_THE_RIGHT = 0.1

RELATIONS = ("", "count", "left", "above", "riding", "in", "looking", "facing", "front", "mirror")
SCALES = ("", "small", "big")
MAX_OBJECTS = 4

Split = Literal["trained", "held_out", "any"]


@dataclass(frozen=True)
class World:
    """What the scenes of a recipe hold, and where.

    `image_px` is the side of its pictures, which are painted at `IMAGE_PX` and made smaller. Sizes and centres are
    multiples of `grid`, a share of the side; 0 lets them be anything. Backgrounds come in `num_variants`.
    """

    image_px: int
    objects: tuple[str, ...]
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    grid: float = 0.0
    num_variants: int = 2**31

    @property
    def shape_names(self) -> tuple[str, ...]:
        return tuple(f"{colour} {shape}" for colour in self.colours for shape in self.shapes)

    @property
    def materials(self) -> tuple[str, ...]:
        return self.of(MATERIALS)

    @property
    def made_names(self) -> tuple[str, ...]:
        """Houses whose walls and roof are pieces of a food."""
        return tuple(f"house of {material}" for material in self.materials)

    def of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the names that are objects here."""
        return tuple(name for name in names if name in self.objects)

    def placed(self, name: str, x: float, y: float, size: float, flip: bool = False) -> Placed:
        """On the grid, where there is one."""
        if self.grid:
            x, y, size = (round(value / self.grid) * self.grid for value in (x, y, size))
        return Placed(name, x, y, size, flip)


FULL = World(IMAGE_PX, tuple(OBJECTS), tuple(COLOURS), SHAPES)
"""All there is, for a GPU."""
SHAPE_NAMES, MADE_NAMES = FULL.shape_names, FULL.made_names
SPRITES: tuple[str, ...] = (*FULL.objects, *SHAPE_NAMES, *MADE_NAMES)
"""Everything that can be placed, by name."""
SMALL = World(
    image_px=64,
    objects=(
        "astronaut", "horse", "duck", "turtle", "dog", "cat", "house", "sushi", "tree", "rocket", "apple", "banana",
        "car", "fish", "butterfly", "mushroom", "pizza", "penguin", "frog", "robot", "mirror",
    ),
    colours=("red", "yellow", "green", "blue", "purple"),
    shapes=("circle", "square", "heart"),
    grid=1 / 16,
    num_variants=8,
)  # fmt: skip
"""What two cores of a CPU learn to draw in hours: fewer things, at places half a latent apart."""


@dataclass(frozen=True)
class Placed:
    """One of `SPRITES`: centre `x`, `y` and longer side `size`, as fractions of the picture's side, y downwards.

    `flip` mirrors it, so that what faces left in the font faces right.
    """

    name: str
    x: float
    y: float
    size: float
    flip: bool = False


@dataclass(frozen=True)
class Scene:
    """What a picture shows. The first object stands in front of the others, the second in front of the third.

    `relation` says how the first stands to the second: "" (one object), "count" (all are the same), "left" (it is left
    of it), "above", "riding", "in", "looking" (at it), "facing" (each other), "front" (in front of it), "mirror" (it
    sees the second, maybe its like, in the third, a mirror). `scale` is "small", "" or "big" for one object
    alone. `background_seed` fixes the painted details.
    """

    objects: tuple[Placed, ...]
    background: str
    relation: str = ""
    scale: str = ""
    background_seed: int = 0


# The pairs that the README asks for are always trained.
_SHOWN = {("astronaut", "horse"), ("duck", "turtle"), ("cat", "dog"), ("dog", "house"), ("dog", "mirror")}
# Whoever looks does so in mirrors too, and a house may be made of a food, and somebody be in it: such pairs meet.
_MEETS_ALL = ("mirror", "house", *(f"house of {material}" for material in MATERIALS))


def _share(text: str) -> int:
    """A number from 0 to 99 that depends on the text alone."""
    return zlib.crc32(text.encode()) % 100


def _meet_anyway(first: str, second: str) -> bool:
    pair = {first, second}
    lives_in_food = any(a in DWELLERS and b in MATERIALS for a, b in ((first, second), (second, first)))
    return tuple(sorted(pair)) in _SHOWN or not pair.isdisjoint(_MEETS_ALL) or lives_in_food


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether training never shows these two in one picture, whatever their order and relation: one pair in ten of
    those that no third thing brings together."""
    pair = sorted((first, second))
    return first != second and not _meet_anyway(first, second) and _share(f"pair {pair[0]} {pair[1]}") < 10


def is_held_out_relation(relation: str, first: str, second: str) -> bool:
    """Whether training never shows these two in this relation, though maybe in another: one in ten."""
    if relation in ("", "count") or tuple(sorted((first, second))) in _SHOWN:
        return False
    if relation == "facing" or (relation == "looking" and second in LOOKERS):
        return False  # one picture shows the one looking, the other looking, and both facing each other
    if relation == "in" and second == "house":
        return False  # one made of a food is a house too
    return _share(f"{relation} {first} {second}") < 10


Layout = tuple[tuple[Placed, ...], str, str]
"""Objects, relation, scale."""


def _single(rng: random.Random, world: World) -> Layout:
    scale = rng.choices(SCALES, (0.76, 0.12, 0.12))[0]
    low, high = {"": (0.58, 0.78), "big": (0.82, 0.9), "small": (0.32, 0.42)}[scale]
    jitter = 0.16 if scale == "small" else 0.06
    placed = _within(rng, world, rng.choice(world.objects), 0.5, 0.54, rng.uniform(low, high), jitter)
    return (placed,), "", scale


def _shape(rng: random.Random, world: World) -> Layout:
    if rng.random() < 0.4:
        return (_within(rng, world, rng.choice(world.shape_names), 0.5, 0.5, rng.uniform(0.4, 0.66), 0.08),), "", ""
    return _beside(rng, world, *rng.sample(world.shape_names, 2))


def _count(rng: random.Random, world: World) -> Layout:
    name = rng.choice((*world.objects, *rng.sample(world.shape_names, 8)))
    number = rng.choice((2, 3, 4))
    size = rng.uniform(*{2: (0.4, 0.46), 3: (0.31, 0.37), 4: (0.31, 0.37)}[number])
    row = {
        2: ((0.26, 0.53), (0.74, 0.53)),
        3: rng.choice((((0.18, 0.53), (0.5, 0.53), (0.82, 0.53)), ((0.5, 0.27), (0.26, 0.73), (0.74, 0.73)))),
        4: ((0.26, 0.27), (0.74, 0.27), (0.26, 0.74), (0.74, 0.74)),
    }[number]
    return tuple(_within(rng, world, name, x, y, size, 0.02) for x, y in row), "count", ""


def _pair(rng: random.Random, world: World) -> Layout:
    return _beside(rng, world, *rng.sample((*world.objects, *rng.sample(world.shape_names, 6)), 2))


def _beside(rng: random.Random, world: World, first: str, second: str) -> Layout:
    if rng.random() < 0.6:
        y = rng.uniform(0.48, 0.62)
        a = _within(rng, world, first, 0.255, y, rng.uniform(0.42, 0.48), 0.03)
        b = _within(rng, world, second, 0.745, y, rng.uniform(0.42, 0.48), 0.03)
        return (a, b), "left", ""
    a = _within(rng, world, first, 0.5, 0.25, rng.uniform(0.4, 0.46), 0.03)
    b = _within(rng, world, second, 0.5, 0.74, rng.uniform(0.4, 0.46), 0.03)
    return (a, b), "above", ""


def _riding(rng: random.Random, world: World) -> Layout:
    mount = rng.choice(world.of(MOUNTS))
    rider = rng.choice([name for name in world.of(RIDERS) if name != mount])
    mount_size, rider_size = rng.uniform(0.54, 0.6), rng.uniform(0.38, 0.44)
    below = _within(rng, world, mount, 0.5, 0.7, mount_size, 0.03)
    above = _within(rng, world, rider, below.x + 0.02, below.y - mount_size * 0.4 - rider_size * 0.36, rider_size, 0.01)
    return (above, below), "riding", ""


def _in(rng: random.Random, world: World) -> Layout:
    container = rng.choice((*world.of(CONTAINERS), *rng.sample(world.made_names, 4)))
    around = _within(rng, world, container, 0.5, 0.5, rng.uniform(0.82, 0.9), 0.02)
    inside = _within(
        rng, world, rng.choice(world.of(DWELLERS)), around.x, around.y + 0.17, rng.uniform(0.36, 0.42), 0.02
    )
    return (inside, around), "in", ""


def _made(rng: random.Random, world: World) -> Layout:
    return (_within(rng, world, rng.choice(world.made_names), 0.5, 0.52, rng.uniform(0.74, 0.9), 0.05),), "", ""


def _looking(rng: random.Random, world: World) -> Layout:
    looker = rng.choice(world.of(LOOKERS))
    other = rng.choice([name for name in world.objects if name != looker])
    is_right = rng.random() < NAMED_FIRST_ON_THE_RIGHT
    y = rng.uniform(0.5, 0.62)
    a = _within(rng, world, looker, 0.74 if is_right else 0.26, y, rng.uniform(0.42, 0.48), 0.03, flip=not is_right)
    b = _within(rng, world, other, 0.26 if is_right else 0.74, y, rng.uniform(0.4, 0.46), 0.03)
    return (a, b), "looking", ""


def _facing(rng: random.Random, world: World) -> Layout:
    first, second = rng.sample(world.of(LOOKERS), 2)
    is_right = rng.random() < NAMED_FIRST_ON_THE_RIGHT
    y = rng.uniform(0.5, 0.62)
    a = _within(rng, world, first, 0.74 if is_right else 0.26, y, rng.uniform(0.42, 0.48), 0.03, flip=not is_right)
    b = _within(rng, world, second, 0.26 if is_right else 0.74, y, rng.uniform(0.42, 0.48), 0.03, flip=is_right)
    return (a, b), "facing", ""


def _front(rng: random.Random, world: World) -> Layout:
    behind_name = rng.choice(world.of(BACKDROPS))
    behind = _within(rng, world, behind_name, 0.5, 0.42, rng.uniform(0.64, 0.74), 0.03)
    before_name = rng.choice([name for name in world.of((*DWELLERS, *LOOKERS)) if name != behind_name])
    side = 1 if rng.random() < NAMED_FIRST_ON_THE_RIGHT else -1
    before = _within(rng, world, before_name, behind.x + side * 0.17, 0.78, rng.uniform(0.36, 0.42), 0.02)
    return (before, behind), "front", ""


def _mirror(rng: random.Random, world: World) -> Layout:
    looker, seen = rng.choice(world.of(LOOKERS)), rng.choice(world.of(LOOKERS))
    is_right = rng.random() < 0.5
    mirror = _within(rng, world, "mirror", 0.31 if is_right else 0.69, 0.47, rng.uniform(0.84, 0.9), 0.02)
    a = _within(rng, world, looker, 0.77 if is_right else 0.23, 0.72, rng.uniform(0.4, 0.44), 0.02, flip=not is_right)
    glass = world.placed(seen, mirror.x, mirror.y + rng.uniform(-0.01, 0.03), rng.uniform(0.35, 0.39), is_right)
    return (a, glass, mirror), "mirror", ""


KINDS: dict[str, tuple[float, Callable[[random.Random, World], Layout]]] = {
    "single": (0.24, _single),
    "shape": (0.12, _shape),
    "count": (0.1, _count),
    "pair": (0.26, _pair),
    "riding": (0.05, _riding),
    "in": (0.05, _in),
    "made": (0.02, _made),
    "looking": (0.05, _looking),
    "facing": (0.04, _facing),
    "front": (0.03, _front),
    "mirror": (0.04, _mirror),
}
"""Kind of scene -> its share of a series, and what draws its objects."""


def is_held_out(scene: Scene) -> bool:
    """Whether training never shows this combination of objects."""
    names = [placed.name for placed in scene.objects]
    if len(set(names)) < 2:
        return False
    return is_held_out_pair(names[0], names[1]) or is_held_out_relation(scene.relation, names[0], names[1])


def sample_scene(rng: random.Random, kind: str | None = None, split: Split = "trained", world: World = FULL) -> Scene:
    """Draw a scene of a kind in `KINDS`, by default of any; `split` keeps to what training shows, or to the rest."""
    background = rng.choice(PLACES) if rng.random() < 0.6 else _plain_background(rng)
    background_seed = rng.randrange(world.num_variants)
    if kind is None:
        kind = rng.choices(tuple(KINDS), [share for share, _ in KINDS.values()])[0]
    while True:
        objects, relation, scale = KINDS[kind][1](rng, world)
        scene = Scene(objects, background, relation, scale, background_seed)
        if split == "any" or is_held_out(scene) == (split == "held_out"):
            return scene


def scene_at(seed: int, index: int, split: Split = "trained", world: World = FULL) -> Scene:
    """Return scene number `index` of the endless series that `seed` starts."""
    return sample_scene(random.Random(f"scene-{seed}-{index}"), split=split, world=world)


def _plain_background(rng: random.Random) -> str:
    return rng.choices(tuple(PLAIN), [3.0 if name == "white" else 1.0 for name in PLAIN])[0]


def _within(
    rng: random.Random,
    world: World,
    name: str,
    x: float,
    y: float,
    size: float,
    jitter: float,
    flip: bool = False,
) -> Placed:
    """Jitter a place, then keep the object inside the picture."""
    low, high = size / 2 + 0.01, 0.99 - size / 2
    x = min(max(x + rng.uniform(-jitter, jitter), low), high)
    y = min(max(y + rng.uniform(-jitter, jitter), low), high)
    return world.placed(name, x, y, size, flip)
