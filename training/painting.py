"""Pictures of emoji world: glyphs, backgrounds, one picture (`render`) and very many on a device (`Painter`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from os import environ
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.world import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_PX,
    MAX_OBJECTS,
    OBJECTS,
    PLAIN,
    SPRITES,
    Colour,
    Placed,
    Scene,
)

FONT_PATH = Path(environ.get("EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
# The font stores one bitmap per glyph, so this is the only size it can be opened at.
FONT_PX = 109
SPRITE_PX = 128
# Painted details of a background repeat after so many seeds, so that a painter can hold them all.
NUM_VARIANTS = 64
# Where the pieces lie on a house that is made of them, in fractions of its side, and their size.
PIECES = (
    (0.5, 0.2), (0.35, 0.31), (0.65, 0.31), (0.2, 0.44), (0.4, 0.46), (0.6, 0.46), (0.8, 0.44),
    (0.22, 0.66), (0.78, 0.66), (0.22, 0.84), (0.78, 0.84),
)  # fmt: skip
PIECE_SIZE = 0.25
_NUMBERS = {name: number for number, name in enumerate(SPRITES)}


def require_font() -> None:
    """End the process where the font is missing, with what to do."""
    if not FONT_PATH.is_file():
        raise SystemExit(f"{FONT_PATH} is missing: apt-get install fonts-noto-color-emoji, or set EMOJI_FONT")


@cache
def _font() -> ImageFont.FreeTypeFont:
    require_font()
    return ImageFont.truetype(str(FONT_PATH), FONT_PX)


def _emoji(text: str) -> Image.Image:
    canvas = Image.new("RGBA", (320, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), text, font=_font(), embedded_color=True)
    return canvas.crop(canvas.getchannel("A").getbbox())


def _shape(name: str) -> Image.Image:
    colour, shape = name.split()
    # Drawn large and made smaller, since the drawing calls do not smooth edges.
    side = 4 * SPRITE_PX
    canvas = Image.new("RGBA", (side, side), (*COLOURS[colour], 0))
    draw, fill = ImageDraw.Draw(canvas), (*COLOURS[colour], 255)
    if shape == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill)
    elif shape == "square":
        draw.rectangle((side * 0.05, side * 0.05, side * 0.95, side * 0.95), fill)
    elif shape == "triangle":
        draw.polygon([(side * 0.5, side * 0.06), (0, side * 0.93), (side, side * 0.93)], fill)
    elif shape == "star":
        angles = [np.pi * (index / 5 - 0.5) for index in range(10)]
        radii = [side * (0.5 if index % 2 == 0 else 0.21) for index in range(10)]
        draw.polygon(
            [(side / 2 + r * np.cos(a), side / 2 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)], fill
        )
    else:
        turns = np.linspace(0, 2 * np.pi, 200)
        x = 16 * np.sin(turns) ** 3
        y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        draw.polygon([(side * (0.5 + px / 33), side * (0.46 - py / 33)) for px, py in zip(x, y, strict=True)], fill)
    small = canvas.convert("RGBa").resize((SPRITE_PX, SPRITE_PX), Image.Resampling.BOX).convert("RGBA")
    return small.crop(small.getchannel("A").getbbox())


def _house_of(material: str) -> Image.Image:
    house = scaled_glyph("house", SPRITE_PX).copy()
    piece = scaled_glyph(material, round(PIECE_SIZE * SPRITE_PX))
    for x, y in PIECES:
        corner = (round(x * house.width - piece.width / 2), round(y * house.height - piece.height / 2))
        house.alpha_composite(piece, corner)
    return house


@cache
def glyph(name: str) -> Image.Image:
    """Return one of `world.SPRITES` as RGBA, cropped to its ink, at its own size."""
    if name in OBJECTS:
        return _emoji(OBJECTS[name][0])
    if name.startswith("house of "):
        return _house_of(name.removeprefix("house of "))
    return _shape(name)


@lru_cache(maxsize=16384)
def scaled_glyph(name: str, size_px: int) -> Image.Image:
    """The sprite as RGBA with its longer side `size_px`."""
    source = glyph(name)
    scale = size_px / max(source.size)
    width, height = (max(1, round(side * scale)) for side in source.size)
    # Premultiplied, so that the colour of transparent pixels does not bleed into the edges.
    return source.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")


def size_px(placed: Placed) -> int:
    """Longer side in pixels: even numbers only, so that a painter holds half as many sprites."""
    return 2 * round(placed.size * IMAGE_PX / 2)


def corner(placed: Placed) -> tuple[int, int]:
    """Left and top of the sprite in pixels."""
    sprite = scaled_glyph(placed.name, size_px(placed))
    return round(placed.x * IMAGE_PX - sprite.width / 2), round(placed.y * IMAGE_PX - sprite.height / 2)


def render(scene: Scene) -> Image.Image:
    """Paint the scene as RGB, `IMAGE_PX` square. Later objects are painted first: a rider sits on its mount."""
    picture = background_picture(scene.background, scene.background_seed % NUM_VARIANTS).copy()
    for placed in reversed(scene.objects):
        sprite = scaled_glyph(placed.name, size_px(placed))
        if placed.flip:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture.paste(sprite, corner(placed), sprite)
    return picture


def scene_pixels(scenes: Sequence[Scene], image_px: int = IMAGE_PX) -> np.ndarray:
    """Render scenes, made smaller where `image_px` says so. Returns `[N, H, W, 3]` uint8."""
    return np.stack([np.asarray(render(scene).reduce(IMAGE_PX // image_px)) for scene in scenes])


def at_image_px(pictures: np.ndarray) -> np.ndarray:
    """`[N, H, W, 3]` uint8 at `IMAGE_PX`: smaller pictures are read enlarged."""
    if pictures.shape[1:3] == (IMAGE_PX, IMAGE_PX):
        return pictures
    side = (IMAGE_PX, IMAGE_PX)
    return np.stack([np.asarray(Image.fromarray(p).resize(side, Image.Resampling.BICUBIC)) for p in pictures])


@cache
def background_picture(name: str, variant: int) -> Image.Image:
    """One of `BACKGROUNDS` as RGB, `IMAGE_PX` square; `variant` below `NUM_VARIANTS` fixes its details."""
    rng = random.Random(f"{name} {variant}")
    if name in PLAIN:
        shade = rng.uniform(0.97, 1.0)
        return Image.new("RGB", (IMAGE_PX, IMAGE_PX), tuple(round(channel * shade) for channel in PLAIN[name]))
    canvas = Image.new("RGB", (2 * IMAGE_PX, 2 * IMAGE_PX))
    _PAINTERS[name](_Brush(canvas), rng)
    return canvas.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BOX)


def pack_layers(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Scenes as numbers for a `Painter`, back to front.

    Returns layers `[N, MAX_OBJECTS, 5]` int16 (sprite in `world.SPRITES` or -1, size, left, top, flip), and
    backgrounds `[N]` int16 (background and variant in one).
    """
    layers = np.full((len(scenes), MAX_OBJECTS, 5), -1, np.int16)
    backgrounds = np.empty(len(scenes), np.int16)
    for index, scene in enumerate(scenes):
        backgrounds[index] = BACKGROUNDS.index(scene.background) * NUM_VARIANTS + scene.background_seed % NUM_VARIANTS
        for depth, placed in enumerate(reversed(scene.objects)):
            layers[index, depth] = (_NUMBERS[placed.name], size_px(placed), *corner(placed), placed.flip)
    return layers, backgrounds


class Painter:
    """Renders packed scenes on a device, to the same bytes as `render`.

    It holds every sprite at every even size from `MIN_PX` to `MAX_PX`, which takes about 100 MB, and every background.
    """

    MIN_PX, MAX_PX = 36, 118

    def __init__(self, device: torch.device) -> None:
        self.device = device
        sizes = range(self.MIN_PX, self.MAX_PX + 1, 2)
        pixels: list[np.ndarray] = []
        where = np.zeros((len(SPRITES), len(sizes), 3), np.int64)
        start = 0
        for number, name in enumerate(SPRITES):
            for step, size in enumerate(sizes):
                sprite = np.asarray(scaled_glyph(name, size))
                where[number, step] = start, sprite.shape[0], sprite.shape[1]
                pixels.append(sprite.reshape(-1, 4))
                start += len(pixels[-1])
        self._pixels = torch.from_numpy(np.concatenate(pixels)).to(device)
        self._where = torch.from_numpy(where).to(device)
        names = [(name, variant) for name in BACKGROUNDS for variant in range(NUM_VARIANTS)]
        pictures = np.stack([np.asarray(background_picture(name, variant)) for name, variant in names])
        self._backgrounds = torch.from_numpy(pictures).to(device)

    def paint(self, layers: Tensor, backgrounds: Tensor) -> Tensor:
        """`layers` `[N, MAX_OBJECTS, 5]` and `backgrounds` `[N]` of `pack_layers`. Returns `[N, H, W, 3]` uint8."""
        layers, backgrounds = layers.to(self.device).long(), backgrounds.to(self.device).long()
        picture = self._backgrounds[backgrounds].int()
        axis = torch.arange(IMAGE_PX, device=self.device)
        for number, size, left, top, flip in (layers[:, depth].unbind(1) for depth in range(MAX_OBJECTS)):
            start, height, width = self._where[number.clamp(min=0), ((size - self.MIN_PX) // 2).clamp(min=0)].unbind(1)
            row = axis[None, :] - top[:, None]
            column = axis[None, :] - left[:, None]
            is_row = (row >= 0) & (row < height[:, None]) & (number >= 0)[:, None]
            is_column = (column >= 0) & (column < width[:, None])
            column = torch.where(flip[:, None] > 0, width[:, None] - 1 - column, column)
            inside = is_row[:, :, None] & is_column[:, None, :]
            place = start[:, None, None] + row[:, :, None] * width[:, None, None] + column[:, None, :]
            sprite = self._pixels[torch.where(inside, place, 0)].int()
            alpha = torch.where(inside, sprite[..., 3], 0)[..., None]
            # Pillow's own rounding of a blend.
            blend = sprite[..., :3] * alpha + picture * (255 - alpha) + 128
            picture = ((blend >> 8) + blend) >> 8
        return picture.byte()


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


def _meadow(brush: _Brush, rng: random.Random) -> None:
    brush.gradient((130, 205, 245), (214, 240, 250))
    x = rng.choice((0.2, 0.8))
    for offset_x, offset_y in ((-0.07, 0.0), (0.0, -0.03), (0.07, 0.0)):
        brush.disc(x + offset_x, 0.15 + offset_y, 0.08, 0.05, (255, 255, 255))
    brush.disc(rng.uniform(0.1, 0.4), 1.12, 0.9, 0.52, (140, 200, 84))
    brush.disc(rng.uniform(0.6, 0.9), 1.16, 0.9, 0.48, (116, 184, 70))
    for _ in range(12):
        x, y = rng.random(), rng.uniform(0.76, 0.98)
        brush.disc(x, y, 0.016, 0.016, rng.choice(((250, 240, 110), (240, 130, 170), (255, 255, 255))))


def _mountains(brush: _Brush, rng: random.Random) -> None:
    brush.gradient((150, 190, 230), (236, 226, 220))
    for x, height, half in ((0.2, 0.5, 0.36), (0.78, 0.58, 0.42), (0.5, 0.38, 0.3)):
        x, top = x + rng.uniform(-0.05, 0.05), 0.86 - height + rng.uniform(-0.03, 0.03)
        brush.polygon([(x, top), (x - half, 0.88), (x + half, 0.88)], (110, 104, 128))
        cap = 0.28
        rise = (0.88 - top) * cap
        brush.polygon([(x, top), (x - half * cap, top + rise), (x + half * cap, top + rise)], (246, 248, 252))
    brush.box(0, 0.84, 1, 1, (94, 126, 88))


_PAINTERS: dict[str, Callable[[_Brush, random.Random], None]] = {
    "forest": _forest,
    "night": _night,
    "beach": _beach,
    "snow": _snow,
    "desert": _desert,
    "city": _city,
    "sea": _sea,
    "meadow": _meadow,
    "mountains": _mountains,
}
