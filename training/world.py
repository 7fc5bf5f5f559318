"""Emoji world: small scenes of colour glyphs over painted backgrounds, each with captions made from the scene.

Everything follows from a seed: `sample_scene(rng)` places objects, `render(scene)` paints them, and
`caption(scene, rng)` says in varied words what is where. The glyphs come from Noto Color Emoji (SIL OFL 1.1).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_PX = 64
FONT_PATH = Path(os.environ.get("EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
# The font stores one bitmap per glyph, so this is the only size it can be opened at.
FONT_PX = 109

# name -> (glyph, noun phrases without an article)
OBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "astronaut": ("\U0001f9d1\u200d\U0001f680", ("astronaut", "astronaut", "spaceman")),
    "horse": ("\U0001f40e", ("horse", "horse", "brown horse", "pony")),
    "duck": ("\U0001f986", ("duck", "duck", "mallard")),
    "turtle": ("\U0001f422", ("turtle", "turtle", "green turtle", "tortoise")),
    "dog": ("\U0001f415", ("dog", "dog", "puppy")),
    "cat": ("\U0001f408", ("cat", "cat", "orange cat", "kitten")),
    "house": ("\U0001f3e0", ("house", "house", "home", "cottage")),
    "sushi": ("\U0001f363", ("sushi", "sushi", "piece of sushi", "plate of sushi")),
    "tree": ("\U0001f333", ("tree", "tree", "green tree")),
    "rocket": ("\U0001f680", ("rocket", "rocket", "space rocket", "spaceship")),
    "apple": ("\U0001f34e", ("apple", "apple", "red apple")),
    "banana": ("\U0001f34c", ("banana", "banana", "yellow banana")),
    "car": ("\U0001f697", ("car", "car", "red car")),
    "fish": ("\U0001f420", ("fish", "fish", "yellow fish", "tropical fish")),
    "butterfly": ("\U0001f98b", ("butterfly", "butterfly", "orange butterfly")),
    "mushroom": ("\U0001f344", ("mushroom", "mushroom", "red mushroom", "toadstool")),
    "pizza": ("\U0001f355", ("pizza", "pizza", "slice of pizza")),
    "penguin": ("\U0001f427", ("penguin", "penguin")),
    "frog": ("\U0001f438", ("frog", "frog", "green frog")),
    "robot": ("\U0001f916", ("robot", "robot", "grey robot")),
}
RIDERS = ("astronaut", "robot", "frog", "penguin", "duck", "cat", "dog")
MOUNTS = ("horse", "turtle", "dog", "cat", "car", "fish", "rocket")

Colour = tuple[int, int, int]
PLAIN: dict[str, Colour] = {
    "white": (250, 250, 250),
    "blue": (150, 200, 245),
    "pink": (250, 190, 210),
    "yellow": (250, 232, 150),
    "green": (175, 225, 170),
    "purple": (205, 185, 240),
}
PLACES: dict[str, tuple[str, ...]] = {
    "forest": ("in a forest", "in the forest", "in the woods"),
    "night": ("at night", "at night", "under the stars", "at night under the moon"),
    "beach": ("on a beach", "on the beach", "at the beach", "by the sea"),
    "snow": ("in the snow", "in the snow", "in winter", "on a snowy day"),
    "desert": ("in a desert", "in the desert", "on the sand dunes"),
    "city": ("in a city", "in the city", "in front of the city skyline", "in town"),
    "sea": ("under water", "underwater", "under the sea", "in the ocean"),
}
BACKGROUNDS: tuple[str, ...] = (*PLACES, *PLAIN)


@dataclass(frozen=True)
class Placed:
    """One object: centre `x`, `y` and longer side `size`, all as fractions of the picture's side, y downwards."""

    name: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. With two objects `relation` tells how the first stands to the second.

    `relation` is one of "" (one object), "left" (the first is left of the second), "above", "riding".
    `scale` is "small", "" or "big" for a single object. `background_seed` fixes the painted details.
    """

    objects: tuple[Placed, ...]
    background: str
    relation: str = ""
    scale: str = ""
    background_seed: int = 0


def sample_scene(rng: random.Random, single_share: float = 0.5) -> Scene:
    """Draw a scene; `single_share` is the probability of one object alone."""
    background = rng.choice(tuple(PLACES)) if rng.random() < 0.6 else _plain_background(rng)
    background_seed = rng.randrange(2**31)
    if rng.random() < single_share:
        scale = rng.choices(("", "big", "small"), (0.76, 0.12, 0.12))[0]
        low, high = {"": (0.62, 0.8), "big": (0.82, 0.92), "small": (0.4, 0.48)}[scale]
        placed = _within(rng, rng.choice(tuple(OBJECTS)), 0.5, 0.54, rng.uniform(low, high), 0.05)
        return Scene((placed,), background, "", scale, background_seed)
    relation = rng.choices(("left", "above", "riding"), (0.5, 0.25, 0.25))[0]
    if relation == "riding":
        mount = rng.choice(MOUNTS)
        rider = rng.choice([name for name in RIDERS if name != mount])
        mount_size, rider_size = rng.uniform(0.54, 0.62), rng.uniform(0.4, 0.46)
        below = _within(rng, mount, 0.5, 0.68, mount_size, 0.03)
        back = below.y - mount_size * _height_share(mount) / 2 + 0.09
        above = Placed(rider, below.x + 0.02, back - rider_size * _height_share(rider) / 2, rider_size)
        return Scene((above, below), background, relation, "", background_seed)
    first, second = rng.sample(tuple(OBJECTS), 2)
    if relation == "left":
        y = rng.uniform(0.5, 0.62)
        a = _within(rng, first, 0.255, y, rng.uniform(0.42, 0.48), 0.03)
        b = _within(rng, second, 0.745, y, rng.uniform(0.42, 0.48), 0.03)
    else:
        a = _within(rng, first, 0.5, 0.25, rng.uniform(0.4, 0.46), 0.03)
        b = _within(rng, second, 0.5, 0.74, rng.uniform(0.4, 0.46), 0.03)
    return Scene((a, b), background, relation, "", background_seed)


def _plain_background(rng: random.Random) -> str:
    return rng.choices(tuple(PLAIN), [3.0 if name == "white" else 1.0 for name in PLAIN])[0]


def _within(rng: random.Random, name: str, x: float, y: float, size: float, jitter: float) -> Placed:
    """Jitter a place, then keep the object inside the picture."""
    low, high = size / 2 + 0.01, 0.99 - size / 2
    x = min(max(x + rng.uniform(-jitter, jitter), low), high)
    y = min(max(y + rng.uniform(-jitter, jitter), low), high)
    return Placed(name, x, y, size)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT_PATH), FONT_PX)


@cache
def glyph(name: str) -> Image.Image:
    """Return the object's glyph as RGBA, cropped to its ink, at the font's own size."""
    canvas = Image.new("RGBA", (320, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), OBJECTS[name][0], font=_font(), embedded_color=True)
    return canvas.crop(canvas.getchannel("A").getbbox())


def _height_share(name: str) -> float:
    """Return the glyph's height over its longer side."""
    return glyph(name).height / max(glyph(name).size)


@lru_cache(maxsize=4096)
def _scaled_glyph(name: str, size_px: int) -> Image.Image:
    source = glyph(name)
    scale = size_px / max(source.size)
    width, height = (max(1, round(side * scale)) for side in source.size)
    # Premultiplied, so that the colour of transparent pixels does not bleed into the edges.
    return source.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")


def render(scene: Scene, image_px: int = IMAGE_PX) -> Image.Image:
    """Paint the scene as RGB, `image_px` square. Later objects are painted first: a rider sits on its mount."""
    # Backgrounds are drawn at twice the size, since the drawing calls do not smooth edges.
    canvas = Image.new("RGB", (2 * image_px, 2 * image_px))
    _paint_background(canvas, scene)
    picture = canvas.resize((image_px, image_px), Image.Resampling.BOX)
    for placed in reversed(scene.objects):
        sprite = _scaled_glyph(placed.name, round(placed.size * image_px))
        corner = (round(placed.x * image_px - sprite.width / 2), round(placed.y * image_px - sprite.height / 2))
        picture.paste(sprite, corner, sprite)
    return picture


def _paint_background(canvas: Image.Image, scene: Scene) -> None:
    side = canvas.width
    rng = random.Random(scene.background_seed)
    if scene.background in PLAIN:
        shade = rng.uniform(0.97, 1.0)
        canvas.paste(tuple(round(channel * shade) for channel in PLAIN[scene.background]), (0, 0, side, side))
        return
    _PAINTERS[scene.background](_Brush(canvas), rng)


class _Brush:
    """Draws on a square canvas in fractions of its side."""

    def __init__(self, canvas: Image.Image) -> None:
        self.canvas = canvas
        self.side = canvas.width
        self.draw = ImageDraw.Draw(canvas)

    def gradient(self, top: Colour, bottom: Colour) -> None:
        ramp = np.linspace(0, 1, self.side)[:, None, None]
        rows = (1 - ramp) * np.array(top) + ramp * np.array(bottom)
        pixels = np.broadcast_to(rows, (self.side, self.side, 3)).round().astype(np.uint8)
        self.canvas.paste(Image.fromarray(pixels), (0, 0))

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.draw.rectangle([value * self.side for value in (left, top, right, bottom)], fill=colour)

    def disc(self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        bounds = (x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        self.draw.ellipse([value * self.side for value in bounds], fill=colour)

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=colour)


def _forest(brush: _Brush, rng: random.Random) -> None:
    brush.gradient((120, 175, 150), (150, 200, 160))
    for index in range(6):
        x, height = 0.02 + 0.19 * index + rng.uniform(-0.03, 0.03), rng.uniform(0.5, 0.66)
        shade = rng.randint(-8, 8)
        for tier in range(3):
            top = 0.74 - height + tier * height / 4
            half = 0.07 + 0.035 * tier
            colour = (24 + shade, 84 + shade, 52 + shade)
            brush.polygon([(x, top), (x - half, top + height / 2), (x + half, top + height / 2)], colour)
    brush.box(0, 0.74, 1, 1, (70, 120, 58))


def _night(brush: _Brush, rng: random.Random) -> None:
    brush.gradient((10, 12, 48), (42, 44, 104))
    for _ in range(14):
        x, y, radius = rng.random(), rng.uniform(0, 0.75), rng.uniform(0.008, 0.016)
        brush.disc(x, y, radius, radius, (235, 235, 215))
    x, y = rng.choice((0.14, 0.86)), rng.uniform(0.12, 0.16)
    brush.disc(x, y, 0.085, 0.085, (246, 238, 190))
    brush.disc(x + 0.04, y - 0.02, 0.07, 0.07, (14, 16, 54))
    brush.box(0, 0.84, 1, 1, (28, 34, 58))


def _beach(brush: _Brush, rng: random.Random) -> None:
    brush.gradient((120, 200, 245), (205, 236, 250))
    horizon, shore = 0.42 + rng.uniform(-0.03, 0.03), 0.66 + rng.uniform(-0.03, 0.03)
    brush.box(0, horizon, 1, 1, (40, 140, 200))
    brush.disc(0.5, shore + 0.4, 0.95, 0.42, (250, 250, 245))
    brush.disc(0.5, shore + 0.43, 0.95, 0.42, (238, 214, 150))
    x = rng.choice((0.13, 0.87))
    brush.disc(x, 0.13, 0.075, 0.075, (255, 235, 120))


def _snow(brush: _Brush, rng: random.Random) -> None:
    brush.gradient((160, 180, 205), (212, 224, 236))
    brush.disc(rng.uniform(0.1, 0.4), 0.98, 0.7, 0.3, (232, 240, 248))
    brush.disc(rng.uniform(0.6, 0.9), 1.02, 0.7, 0.32, (246, 250, 254))
    for _ in range(22):
        brush.disc(rng.random(), rng.random(), 0.014, 0.014, (255, 255, 255))


def _desert(brush: _Brush, rng: random.Random) -> None:
    brush.gradient((250, 190, 110), (252, 226, 170))
    brush.disc(rng.choice((0.14, 0.86)), 0.16, 0.09, 0.09, (255, 120, 60))
    brush.disc(rng.uniform(0.0, 0.35), 1.0, 0.6, 0.42, (222, 160, 84))
    brush.disc(rng.uniform(0.65, 1.0), 1.06, 0.7, 0.44, (204, 138, 66))


def _city(brush: _Brush, rng: random.Random) -> None:
    brush.gradient((150, 170, 200), (214, 206, 214))
    left = -0.02
    while left < 1:
        width, top = rng.uniform(0.13, 0.19), rng.uniform(0.16, 0.5)
        grey = rng.randint(84, 124)
        brush.box(left, top, left + width, 0.82, (grey, grey, grey + 16))
        for row in range(int((0.78 - top) / 0.09)):
            for column in (0.25, 0.65):
                x, y = left + width * column, top + 0.04 + 0.09 * row
                brush.box(x, y, x + 0.024, y + 0.036, (240, 224, 150))
        left += width + 0.012
    brush.box(0, 0.82, 1, 1, (66, 66, 72))
    for index in range(4):
        brush.box(0.04 + 0.27 * index, 0.9, 0.16 + 0.27 * index, 0.922, (232, 232, 220))


def _sea(brush: _Brush, rng: random.Random) -> None:
    brush.gradient((40, 160, 205), (10, 62, 128))
    for _ in range(9):
        radius = rng.uniform(0.014, 0.026)
        brush.disc(rng.random(), rng.uniform(0, 0.85), radius, radius, (150, 215, 240))
    for x in (0.06, 0.92):
        for offset in (-0.03, 0.03):
            tip = rng.uniform(0.56, 0.7)
            base = x + offset
            brush.polygon(
                [(base - 0.025, 0.92), (base + rng.uniform(-0.03, 0.03), tip), (base + 0.025, 0.92)], (30, 120, 84)
            )
    brush.disc(0.5, 1.06, 0.8, 0.18, (190, 176, 120))


_PAINTERS: dict[str, Callable[[_Brush, random.Random], None]] = {
    "forest": _forest,
    "night": _night,
    "beach": _beach,
    "snow": _snow,
    "desert": _desert,
    "city": _city,
    "sea": _sea,
}

_PREFIXES = ("a picture of ", "a drawing of ", "an emoji of ", "a photo of ")
_RIDING = ("{a} riding {b}", "{a} riding {b}", "{a} rides {b}", "{a} on top of {b}", "{a} sitting on {b}", "{a} on {b}")
_LEFT = (
    "{a} left of {b}",
    "{a} to the left of {b}",
    "{b} right of {a}",
    "{b} to the right of {a}",
    "{a} on the left and {b} on the right",
    "{b} on the right and {a} on the left",
)
_BESIDE = ("{a} and {b}", "{a} next to {b}", "{a} beside {b}", "{a} with {b}")
_ABOVE = ("{a} above {b}", "{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}")


def caption(scene: Scene, rng: random.Random) -> str:
    """Say the scene in English; calls with other random states give other words for the same scene."""
    phrases = [_noun_phrase(placed.name, scene.scale, rng) for placed in scene.objects]
    if scene.relation == "riding":
        text = rng.choice(_RIDING).format(a=phrases[0], b=phrases[1])
    elif scene.relation == "above":
        text = rng.choice(_ABOVE).format(a=phrases[0], b=phrases[1])
    elif scene.relation == "left":
        if rng.random() < 0.25:
            first, second = rng.sample(phrases, 2)
            text = rng.choice(_BESIDE).format(a=first, b=second)
        else:
            text = rng.choice(_LEFT).format(a=phrases[0], b=phrases[1])
    else:
        text = phrases[0]
    if rng.random() < 0.1:
        text = rng.choice(_PREFIXES) + text
    place = _place_phrase(scene.background, rng)
    if place is None:
        return text
    # A leading "in a city, ..." keeps the order of the two parts from mattering.
    return f"{place}, {text}" if rng.random() < 0.1 else f"{text} {place}"


def _noun_phrase(name: str, scale: str, rng: random.Random) -> str:
    noun = rng.choice(OBJECTS[name][1])
    if scale:
        words = {"big": ("big", "large", "huge"), "small": ("small", "little", "tiny")}[scale]
        noun = f"{rng.choice(words)} {noun}"
    elif noun in ("sushi", "pizza") and rng.random() < 0.5:
        return noun if rng.random() < 0.7 else f"some {noun}"
    if rng.random() < 0.12:
        return f"the {noun}"
    if rng.random() < 0.06:
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _place_phrase(background: str, rng: random.Random) -> str | None:
    """Return words for the background, or None: plain ones often go unsaid, so "a dog" alone stays a clear picture."""
    if background in PLACES:
        return rng.choice(PLACES[background])
    if rng.random() < (0.7 if background == "white" else 0.3):
        return None
    return rng.choice((f"on a {background} background", f"on a plain {background} background", f"on {background}"))


def scene_at(seed: int, index: int, single_share: float = 0.5) -> Scene:
    """Return scene number `index` of the endless series that `seed` starts."""
    return sample_scene(random.Random(f"scene-{seed}-{index}"), single_share)


def scene_pixels(seed: int, num_scenes: int, single_share: float = 0.5, image_px: int = IMAGE_PX) -> np.ndarray:
    """Render scenes 0..num_scenes-1 of a series. Returns `[N, H, W, 3]` uint8."""
    pixels = np.empty((num_scenes, image_px, image_px, 3), np.uint8)
    for index in range(num_scenes):
        pixels[index] = np.asarray(render(scene_at(seed, index, single_share), image_px))
    return pixels
