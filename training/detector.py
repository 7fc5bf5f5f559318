"""Finds the sprites of emoji world in pictures, and their background, by comparing with the font's own glyphs.

It shares nothing with the model that drew the picture. A picture is explained step by step: at first by a background
alone, then by sprites before it, each of which has to explain what is not explained yet. In one round

1. every sprite at every place is tried at a quarter of the resolution, as one convolution per size: how much smaller
   the squared error becomes (the gain of matching pursuit, Mallat and Zhang 1993); sprites that others stand before are
   tried once more by how many pixels have about their colours, which is blind to what hides them;
2. the best are moved and scaled a little at half the resolution;
3. they are scored there with an error that is bounded per pixel and forgives a shift of one pixel, so that neither
   what hides a part nor softness counts for much, and those that explain most are taken, if they pass `Thresholds`.

Pixels that a found sprite explains are out of the account from then on, whatever lies before or behind what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.painting import NUM_VARIANTS, background_picture, scaled_glyph
from training.world import (
    BACKGROUNDS,
    CONTAINERS,
    IMAGE_PX,
    LOOKERS,
    MADE_NAMES,
    MOUNTS,
    OBJECTS,
    PLAIN,
    SHAPE_NAMES,
    SPRITES,
)

HALF = IMAGE_PX // 2
QUARTER = IMAGE_PX // 4
# Longer sides at half resolution that can be told apart, and at quarter resolution that are looked for first.
HALF_SIZES = range(18, 61)
QUARTER_SIZES = (9, 10, 11, 12, 13, 14, 16, 18, 20, 22, 24, 26, 28, 30)
# What others stand before is large.
BACK_SIZES = range(16, 31)
BACK_NAMES = {*MOUNTS, *CONTAINERS, *MADE_NAMES, "mirror", "tree", "train", "cactus"}
# Values of a channel that are told apart in counting pixels of about a colour.
NUM_LEVELS = 5
# Squared distance of colours (RGB in [0, 1]) that counts as entirely wrong.
TOLERANCE = 0.09
# A sprite may stick out of the picture by so many pixels of the quarter.
MARGIN = 1
# Each sprite has a best place in each of 3 x 3 parts of the picture. The best of them all are looked at more closely,
# and the best of each part, so that one large object does not take all the places.
PARTS = 3
WINDOW = 6
NUM_CANDIDATES = 12
NUM_EACH_PART = 2
NUM_BACKS = 5
MAX_ROUNDS = 6
# Variants of a background whose details a picture may mix.
NUM_FITTING = 6
MAX_PER_ROUND = 6
MAX_FOUND = 8
# Two sprites of one round may share so much of the smaller one; a sprite and one of an earlier round so much of both,
# or of the smaller one where they are the same.
MAX_OVERLAP = 0.1
SAME_PLACE = 0.5
MAX_UNION = 0.4


@dataclass(frozen=True)
class Thresholds:
    """What a sprite must reach to be found.

    `gain`: what it explains, as a share of what it would explain were the picture drawn with it there; `pixels`: the
    same in pixels of the half. `inliers`: share of its visible pixels that have its colours. `visible`: share of its
    pixels that no sprite found before explains. `contrast`: pixels by which it must differ from what is there without
    it. `alike`: how its colours and the picture's go together where it is not hidden, as a correlation. A shape of one
    colour is found in any blob of it, so there `plain_gain` and `plain_inliers` hold.
    """

    gain: float = 0.45
    inliers: float = 0.6
    visible: float = 0.25
    contrast: float = 75.0
    pixels: float = 60.0
    alike: float = 0.25
    plain_gain: float = 0.55
    plain_inliers: float = 0.7


@dataclass(frozen=True)
class Detection:
    """A sprite found: its name in `world.SPRITES`, centre and longer side as fractions of the picture, as `Placed`.

    `flip` is that of `Placed`; `score` is the share of what it should explain that it does explain, at most about 1.
    """

    name: str
    x: float
    y: float
    size: float
    flip: bool
    score: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: its sprites, most certain first, and its background."""

    detections: tuple[Detection, ...]
    background: str

    @property
    def names(self) -> list[str]:
        return [detection.name for detection in self.detections]


@dataclass
class _Candidates:
    """Places of sprites: all `[B, K]` int64. `template` counts plain and mirrored sprites, sizes and places are of the
    half."""

    template: Tensor
    size: Tensor
    top: Tensor
    left: Tensor

    def scaled(self, steps: tuple[int, ...]) -> _Candidates:
        """Each with every of `steps` added to its size, `[B, K * steps]`, around the same centre."""
        template, old, top, left = (
            getattr(self, field.name).repeat_interleave(len(steps), 1) for field in fields(self)
        )
        delta = torch.tensor(steps, device=old.device).repeat(self.size.shape[1])
        size = (old + delta).clamp(HALF_SIZES.start, HALF_SIZES.stop - 1)
        return _Candidates(template, size, top - (size - old) // 2, left - (size - old) // 2)

    def and_these(self, other: _Candidates) -> _Candidates:
        return _Candidates(
            *(torch.cat([getattr(self, field.name), getattr(other, field.name)], 1) for field in fields(self))
        )

    def take(self, index: Tensor) -> _Candidates:
        return _Candidates(*(value.gather(1, index) for value in (self.template, self.size, self.top, self.left)))


@dataclass
class _State:
    """How far pictures are explained. `image`, `explained` `[B, 3, 64, 64]`; the others `[B, 64, 64]` are 0 where a
    sprite was found: `is_open` where it explains the pixel, `is_vague` where it does so closely, `is_free` everywhere
    that it covers. `found` `[B, MAX_FOUND, 64, 64]` has the alpha of each sprite, `sprites` `[B, MAX_FOUND]` which it
    is, `num_found` `[B]` says how many."""

    image: Tensor
    explained: Tensor
    is_open: Tensor
    is_vague: Tensor
    is_free: Tensor
    found: Tensor
    sprites: Tensor
    num_found: Tensor

    @classmethod
    def of(cls, image: Tensor, explained: Tensor) -> _State:
        found = image.new_zeros(len(image), MAX_FOUND, HALF, HALF)
        maps = (torch.ones_like(image[:, 0]) for _ in range(3))
        sprites = torch.full((len(image), MAX_FOUND), -1, device=image.device)
        return cls(image, explained, *maps, found, sprites, image.new_zeros(len(image), dtype=torch.long))

    def take(self, index: Tensor) -> _State:
        return _State(*(getattr(self, field.name)[index] for field in fields(self)))

    def put(self, index: Tensor, other: _State) -> None:
        for field in fields(self):
            getattr(self, field.name)[index] = getattr(other, field.name)


class Detector:
    """Holds the glyphs on a device. `names` limits what is looked for to some of `world.SPRITES`."""

    def __init__(
        self, device: torch.device, names: Sequence[str] = SPRITES, thresholds: Thresholds | None = None
    ) -> None:
        self.device = device
        self.names = tuple(names)
        self.thresholds = thresholds or Thresholds()
        # Only the font's pictures are ever mirrored.
        self._templates = [(number, False) for number in range(len(self.names))]
        self._templates += [(number, True) for number, name in enumerate(self.names) if name in OBJECTS]
        self._sprite_of = torch.tensor([number for number, _ in self._templates], device=device)
        self._flip_of = torch.tensor([flip for _, flip in self._templates], device=device)
        self._is_plain = torch.tensor([name in SHAPE_NAMES for name in self.names], device=device)
        self._load_sprites()
        self._load_kernels()
        self._load_backgrounds()

    def _load_sprites(self) -> None:
        """Every sprite at every size of the half, premultiplied, one after the other."""
        pixels: list[np.ndarray] = []
        where = np.zeros((len(self.names), len(HALF_SIZES), 3), np.int64)
        start = 0
        for number, name in enumerate(self.names):
            for step, size in enumerate(HALF_SIZES):
                sprite = _halved(np.asarray(scaled_glyph(name, 2 * size).convert("RGBa"), np.float32) / 255)
                where[number, step] = start, sprite.shape[0], sprite.shape[1]
                pixels.append(sprite.reshape(-1, 4))
                start += len(pixels[-1])
        # One more pixel, empty, for what is outside.
        pixels.append(np.zeros((1, 4), np.float32))
        self._pixels = torch.from_numpy(np.concatenate(pixels)).to(self.device)
        self._where = torch.from_numpy(where).to(self.device)

    def _load_kernels(self) -> None:
        """For each size of the quarter `[T, C, q, q]`: what gives the gain, from `_channels` or `_back_channels`."""
        everything = range(len(self._templates))
        self._kernels = [_gain_kernel(self._squares(everything, size)) for size in QUARTER_SIZES]
        is_back = [
            self.names[number] in BACK_NAMES and (not flip or self.names[number] in LOOKERS)
            for number, flip in self._templates
        ]
        backs = [index for index in everything if is_back[index]]
        self._backs = torch.tensor(backs, device=self.device)
        self._back_kernels = [_back_kernel(self._squares(backs, size)) for size in BACK_SIZES] if backs else []

    def _squares(self, templates: Sequence[int], size: int) -> Tensor:
        """Sprites with the longer side `size` at a quarter of the resolution, premultiplied, `[T, 4, size, size]`."""
        squares = np.zeros((len(templates), 4, size, size), np.float32)
        for square, (number, flip) in zip(squares, (self._templates[index] for index in templates), strict=True):
            whole = np.asarray(scaled_glyph(self.names[number], 4 * size).convert("RGBa"), np.float32) / 255
            sprite = _halved(_halved(whole))
            top, left = (size - sprite.shape[0]) // 2, (size - sprite.shape[1]) // 2
            placed = square[:, top : top + sprite.shape[0], left : left + sprite.shape[1]]
            placed[:] = (sprite[:, ::-1] if flip else sprite).transpose(2, 0, 1)
        return torch.from_numpy(squares).to(self.device)

    def _load_backgrounds(self) -> None:
        """Backgrounds at half the resolution, `[V, 3, 64, 64]` of each."""
        self._backgrounds: list[Tensor] = []
        for name in BACKGROUNDS:
            variants = range(0, NUM_VARIANTS, 16 if name in PLAIN else 1)
            pictures = np.stack([np.asarray(background_picture(name, variant)) for variant in variants])
            self._backgrounds.append(_to_half(torch.from_numpy(pictures).to(self.device)))

    @torch.inference_mode()
    def read(self, pixels: np.ndarray | Tensor, chunk: int | None = None) -> list[Reading]:
        """Say what pictures show. `pixels` `[N, 128, 128, 3]` uint8, `chunk` of them at a time."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (IMAGE_PX, IMAGE_PX, 3):
            raise ValueError(f"expected pictures [N, {IMAGE_PX}, {IMAGE_PX}, 3], got {list(pixels.shape)}")
        chunk = chunk or (128 if self.device.type == "cuda" else 8)
        readings: list[Reading] = []
        for start in range(0, len(pixels), chunk):
            readings += self._read(torch.as_tensor(pixels[start : start + chunk]).to(self.device))
        return readings

    def _read(self, pixels: Tensor) -> list[Reading]:
        image = _to_half(pixels)
        nearest = [self._nearest(image, bank) for bank in self._backgrounds]
        first = self._background_errors(image, nearest, torch.ones_like(image[:, 0])).argmin(1)
        explained = torch.empty_like(image)
        for index in first.unique().tolist():
            explained[first == index] = self._few_nearest(image[first == index], self._backgrounds[index])
        state = _State.of(image, explained)
        found: list[list[Detection]] = [[] for _ in range(len(image))]
        active = torch.arange(len(image), device=self.device)
        for _ in range(MAX_ROUNDS):
            # Nothing can pass where less is left to explain.
            left = (state.image - state.explained)[active]
            active = active[_bounded(left).sum((1, 2)) >= self.thresholds.pixels]
            if not len(active):
                break
            part = state.take(active)
            went_on = self._round(part, active.tolist(), found)
            state.put(active, part)
            active = active[went_on]
        best = self._background_errors(image, nearest, state.is_free).argmin(1).tolist()
        return [
            Reading(tuple(sorted(detections, key=lambda detection: -detection.score)), BACKGROUNDS[index])
            for detections, index in zip(found, best, strict=True)
        ]

    def _nearest(self, image: Tensor, bank: Tensor) -> Tensor:
        """The colour that comes nearest to each pixel among those that a background has there. `[B, 3, 64, 64]`."""
        best, least = torch.empty_like(image), torch.full_like(image[:, :1], torch.inf)
        for picture in bank:
            error = (image - picture).square().sum(1, keepdim=True)
            best = torch.where(error < least, picture, best)
            least = torch.minimum(error, least)
        return best

    def _few_nearest(self, image: Tensor, bank: Tensor) -> Tensor:
        """As `_nearest`, but of the few variants that fit the whole picture best: all of them together have nearly any
        colour everywhere, and would explain a grey animal in a city."""
        errors = torch.stack([_bounded(image - picture).sum((1, 2)) for picture in bank], 1)
        few = errors.topk(min(NUM_FITTING, len(bank)), dim=1, largest=False).indices
        return torch.cat([self._nearest(*pair) for pair in zip(image.split(1), bank[few], strict=True)])

    def _background_errors(self, image: Tensor, nearest: list[Tensor], weight: Tensor) -> Tensor:
        """Mean bounded error of each background, `[B, BACKGROUNDS]`, over the pixels that `weight` leaves."""
        errors = torch.stack([_bounded(image - colours) for colours in nearest], 1)
        return (errors * weight[:, None]).sum((2, 3)) / weight.sum((1, 2)).clamp(min=1)[:, None]

    def _round(self, state: _State, numbers: list[int], found: list[list[Detection]]) -> Tensor:
        """Find up to `MAX_PER_ROUND` sprites in each picture. Returns `[B]` bool: whether there was any."""
        candidates = self._move(state, self._search(state)).and_these(self._search_backs(state))
        painted = self._paint(candidates)
        alpha = painted[:, :, 3]
        colours = painted[:, :, :3] + (1 - alpha[:, :, None]) * state.explained[:, None]
        is_plain = self._is_plain[self._sprite_of[candidates.template]]
        gain, scores, passes, error = self._score(state, alpha, colours, is_plain)
        area = alpha.sum((2, 3)).clamp(min=1)
        shared = torch.einsum("bkhw,blhw->bkl", alpha, alpha)
        overlap = shared / torch.minimum(area[:, :, None], area[:, None])
        shared = torch.einsum("bkhw,bfhw->bkf", alpha, state.found)
        union = area[:, :, None] + state.found.sum((2, 3))[:, None] - shared
        smaller = torch.minimum(area[:, :, None], state.found.sum((2, 3)).clamp(min=1)[:, None])
        is_same = self._sprite_of[candidates.template][:, :, None] == state.sprites[:, None]
        passes = passes & (shared / torch.where(is_same, smaller, union) < MAX_UNION).all(2)
        rows = torch.arange(len(gain), device=self.device)
        went_on = torch.zeros(len(gain), dtype=torch.bool, device=self.device)
        # What has to wait for the next round keeps what is worse in its place from being taken in this one.
        waits = torch.zeros_like(passes)
        for _ in range(MAX_PER_ROUND):
            # What is a little larger than it should be explains a little more, but less of what it should.
            chosen = torch.where(passes, gain * scores.clamp(0, 1).square(), -torch.inf).argmax(1)
            is_taken = passes[rows, chosen] & ~waits[rows, chosen] & (state.num_found < MAX_FOUND)
            if not bool(passes.any()):
                break
            went_on |= is_taken
            place = state.num_found.clamp(max=MAX_FOUND - 1)
            sprite = self._sprite_of[candidates.template[rows, chosen]]
            state.sprites[rows, place] = torch.where(is_taken, sprite, state.sprites[rows, place])
            self._explain(state, is_taken, alpha[rows, chosen], colours[rows, chosen], error[rows, chosen])
            self._note(candidates.take(chosen[:, None]), scores[rows, chosen], is_taken, numbers, found)
            waits |= is_taken[:, None] & (overlap[rows, chosen] >= MAX_OVERLAP)
            passes = passes & (overlap[rows, chosen] < SAME_PLACE)
        return went_on

    def _search(self, state: _State) -> _Candidates:
        """The best places by squared error at a quarter of the resolution."""
        channels = F.avg_pool2d(_channels(state), 2)
        return self._best_places(channels, self._kernels, QUARTER_SIZES, NUM_CANDIDATES, NUM_EACH_PART)

    def _search_backs(self, state: _State) -> _Candidates:
        """The best places by number of pixels, of what others stand before, in three sizes each."""
        channels = _back_channels(
            F.avg_pool2d(state.image, 2), F.avg_pool2d(state.explained, 2), F.avg_pool2d(state.is_open[:, None], 2)
        )
        if not self._back_kernels:
            nothing = torch.empty(len(channels), 0, dtype=torch.long, device=self.device)
            return _Candidates(nothing, nothing, nothing, nothing)
        best = self._best_places(channels, self._back_kernels, tuple(BACK_SIZES), NUM_BACKS, 0)
        best.template = self._backs[best.template]
        return best.scaled((-1, 0, 1))

    def _best_places(
        self, channels: Tensor, kernels: Sequence[Tensor], sizes_px: Sequence[int], num: int, num_each_part: int
    ) -> _Candidates:
        """The `num` places where the kernels `[T, C, q, q]` give most on `channels` `[B, C, 32, 32]`, and some of each
        part of the picture."""
        channels = F.pad(channels, [MARGIN] * 4)
        values, places, parts = [], [], []
        for step, kernel in enumerate(kernels):
            gains = F.conv2d(channels, kernel)
            side = gains.shape[-1]
            pooled, index = F.max_pool2d(gains, min(WINDOW, side), ceil_mode=True, return_indices=True)
            values.append(pooled.flatten(2))
            places.append(index.flatten(2) + (step << 16))
            middle = torch.arange(pooled.shape[-1], device=self.device) * WINDOW + min(WINDOW, side) / 2
            part = ((middle - MARGIN + sizes_px[step] / 2) * PARTS / QUARTER).long().clamp(0, PARTS - 1)
            parts.append((part[:, None] * PARTS + part).flatten())
        value, place, part = torch.cat(values, 2), torch.cat(places, 2), torch.cat(parts)
        there = [index for index in range(PARTS * PARTS) if bool((part == index).any())]
        best = [value[:, :, part == index].max(2) for index in there]
        places_of = [
            place[:, :, part == index].gather(2, top.indices[..., None]) for index, top in zip(there, best, strict=True)
        ]
        gain = torch.stack([entry.values for entry in best], 2)
        top = gain.flatten(1).topk(num, dim=1).indices
        each = gain.topk(min(num_each_part, gain.shape[1]), dim=1).indices * len(there)
        each = each + torch.arange(len(there), device=self.device)
        top = torch.cat([top, each.flatten(1)], 1)
        chosen = torch.stack([entry[..., 0] for entry in places_of], 2).flatten(1).gather(1, top)
        step, index = chosen >> 16, chosen & 0xFFFF
        sizes = torch.tensor(sizes_px, device=self.device)[step]
        side = QUARTER + 2 * MARGIN - sizes + 1
        return _Candidates(
            template=top // len(there),
            size=2 * sizes,
            top=2 * (index // side - MARGIN),
            left=2 * (index % side - MARGIN),
        )

    def _move(self, state: _State, candidates: _Candidates) -> _Candidates:
        """Move and scale by squared error at half the resolution, first by much, then by little."""
        candidates = self._moved(state, candidates, (-2, 0, 2), 2)
        return self._moved(state, candidates, (-1, 0, 1), 1)

    def _moved(self, state: _State, candidates: _Candidates, steps: tuple[int, ...], reach: int) -> _Candidates:
        """The best of the sizes that `steps` add and the places within `reach`."""
        num_rows, num_candidates = candidates.size.shape
        scaled = candidates.scaled(steps)
        kernels = _gain_kernel(self._paint(scaled).flatten(0, 1)).view(num_rows, num_candidates * len(steps), -1)
        channels = F.pad(_channels(state), [reach] * 4)
        side = 2 * reach + 1
        shifted = torch.stack(
            [channels[:, :, y : y + HALF, x : x + HALF].flatten(1) for y in range(side) for x in range(side)], 2
        )
        gains = torch.bmm(kernels, shifted).view(num_rows, num_candidates, len(steps) * side * side)
        best = gains.argmax(2)
        step, shift = best // (side * side), best % (side * side)
        moved = scaled.take(torch.arange(num_candidates, device=self.device) * len(steps) + step)
        moved.top += shift // side - reach
        moved.left += shift % side - reach
        return moved

    def _paint(self, candidates: _Candidates) -> Tensor:
        """Each candidate alone on an empty picture, premultiplied, `[B, K, 4, 64, 64]`; centred in its square."""
        shape = candidates.size.shape
        template, size, top, left = (
            value.flatten() for value in (candidates.template, candidates.size, candidates.top, candidates.left)
        )
        start, height, width = self._where[self._sprite_of[template], size - HALF_SIZES.start].unbind(1)
        axis = torch.arange(HALF, device=self.device)
        row = axis[None] - (top + (size - height) // 2)[:, None]
        column = axis[None] - (left + (size - width) // 2)[:, None]
        is_row = (row >= 0) & (row < height[:, None])
        is_column = (column >= 0) & (column < width[:, None])
        column = torch.where(self._flip_of[template][:, None], width[:, None] - 1 - column, column)
        inside = is_row[:, :, None] & is_column[:, None, :]
        place = (start[:, None] + row * width[:, None])[:, :, None] + column[:, None, :]
        painted = self._pixels[torch.where(inside, place, len(self._pixels) - 1)]
        return painted.permute(0, 3, 1, 2).view(*shape, 4, HALF, HALF)

    def _score(
        self, state: _State, alpha: Tensor, colours: Tensor, is_plain: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gain, score and whether it passes `[B, K]`, and the bounded error `[B, K, 64, 64]`."""
        error = torch.full_like(alpha, torch.inf)
        around = F.pad(state.image, [1] * 4, mode="replicate")
        for y in range(3):
            for x in range(3):
                shifted = around[:, None, :, y : y + HALF, x : x + HALF]
                error = torch.minimum(error, (colours - shifted).square().sum(2))
        error = (error / TOLERANCE).clamp(max=1)
        before = _bounded(state.image - state.explained)[:, None]
        contrast = _bounded(colours - state.explained[:, None], 2)
        # Before all that was found, or behind what explains its pixels.
        visible = (alpha, alpha * state.is_open[:, None])
        front, behind = (
            (
                *self._weighed(alpha, weight, before, error, contrast, is_plain),
                _alike(weight * (error < 0.9), state.image, colours),
            )
            for weight in visible
        )
        is_front = front[0] >= behind[0]
        gain, score, passes, alike = (torch.where(is_front, *pair) for pair in zip(front, behind, strict=True))
        return gain, score, passes & (is_plain | (alike >= self.thresholds.alike)), error

    def _weighed(
        self, alpha: Tensor, weight: Tensor, before: Tensor, error: Tensor, contrast: Tensor, is_plain: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gain, score and whether it passes `[B, K]`, with the pixels that count."""
        num_open, num_all = weight.sum((2, 3)).clamp(min=1e-3), alpha.sum((2, 3)).clamp(min=1e-3)
        gain = (weight * (before - error)).sum((2, 3))
        possible = (weight * contrast).sum((2, 3))
        score = gain / possible.clamp(min=1e-3)
        inliers = 1 - (weight * error).sum((2, 3)) / num_open
        limits = self.thresholds
        passes = (
            (score >= torch.where(is_plain, limits.plain_gain, limits.gain))
            & (inliers >= torch.where(is_plain, limits.plain_inliers, limits.inliers))
            & (num_open / num_all >= limits.visible)
            & (possible >= limits.contrast)
            & (gain >= limits.pixels)
        )
        return gain, score, passes

    def _explain(self, state: _State, is_taken: Tensor, alpha: Tensor, colours: Tensor, error: Tensor) -> None:
        """Add a sprite to what explains each picture that `is_taken`."""
        is_covered = (alpha > 0.02) & is_taken[:, None, None]
        # It hides the background, but of what was found before it may be in front or behind.
        before = _bounded(state.image - state.explained)
        is_shown = is_covered & ((error < before) | (state.is_free > 0))
        state.explained = torch.where(is_shown[:, None], colours, state.explained)
        is_edge = is_covered & (alpha <= 0.5)
        state.is_open = torch.where(is_edge | (is_covered & (error < 0.5)), 0.0, state.is_open)
        state.is_vague = torch.where(is_edge | (is_covered & (error < 0.15)), 0.0, state.is_vague)
        rows = torch.arange(len(alpha), device=self.device)
        place = state.num_found.clamp(max=MAX_FOUND - 1)
        state.found[rows, place] = torch.where(is_taken[:, None, None], alpha, state.found[rows, place])
        state.num_found = state.num_found + is_taken
        near = F.max_pool2d(alpha[:, None], 3, stride=1, padding=1)[:, 0]
        state.is_free = torch.where((near > 0.02) & is_taken[:, None, None], 0.0, state.is_free)

    def _note(
        self,
        candidates: _Candidates,
        scores: Tensor,
        is_taken: Tensor,
        numbers: list[int],
        found: list[list[Detection]],
    ) -> None:
        columns = (candidates.template, candidates.size, candidates.top, candidates.left)
        template, size, top, left = (value[:, 0].tolist() for value in columns)
        for index, (score, taken) in enumerate(zip(scores.tolist(), is_taken.tolist(), strict=True)):
            if taken:
                number, flip = self._templates[template[index]]
                centre = size[index] / 2
                found[numbers[index]].append(
                    Detection(
                        self.names[number],
                        (left[index] + centre) / HALF,
                        (top[index] + centre) / HALF,
                        size[index] / HALF,
                        flip,
                        round(score, 3),
                    )
                )


def _halved(sprite: np.ndarray) -> np.ndarray:
    """`[H, W, 4]` at half the resolution, rounded up."""
    height, width = sprite.shape[:2]
    padded = np.pad(sprite, ((0, height % 2), (0, width % 2), (0, 0)))
    return padded.reshape((height + 1) // 2, 2, (width + 1) // 2, 2, 4).mean((1, 3))


def _to_half(pixels: Tensor) -> Tensor:
    """`[N, 128, 128, 3]` uint8 to `[N, 3, 64, 64]` in [0, 1]."""
    return F.avg_pool2d(pixels.permute(0, 3, 1, 2).float() / 255, 2)


def _bounded(difference: Tensor, dim: int = 1) -> Tensor:
    """Squared distance of colours as a share of `TOLERANCE`, at most 1."""
    return (difference.square().sum(dim) / TOLERANCE).clamp(max=1)


def _alike(weight: Tensor, image: Tensor, colours: Tensor) -> Tensor:
    """Correlation `[B, K]` of `image` `[B, 3, 64, 64]` and `colours` `[B, K, 3, 64, 64]`, each channel less its mean,
    with the pixels of `weight` `[B, K, 64, 64]`."""
    weight, image = weight[:, :, None], image[:, None]
    total = weight.sum((3, 4), keepdim=True).clamp(min=1e-3)
    image = image - (weight * image).sum((3, 4), keepdim=True) / total
    colours = colours - (weight * colours).sum((3, 4), keepdim=True) / total
    product = (weight * image * colours).sum((2, 3, 4))
    energy = (weight * image.square()).sum((2, 3, 4)) * (weight * colours.square()).sum((2, 3, 4))
    return product / energy.sqrt().clamp(min=1e-3)


def _channels(state: _State) -> Tensor:
    """`[B, 9, 64, 64]`: what `_gain_kernel` is multiplied with."""
    image, explained = state.image, state.explained
    difference = image - explained
    product = (difference * explained).sum(1, keepdim=True)
    energy = explained.square().sum(1, keepdim=True)
    channels = [2 * difference, -2 * product, torch.ones_like(energy), 2 * explained, -energy]
    return torch.cat(channels, 1) * state.is_vague[:, None]


def _gain_kernel(sprites: Tensor) -> Tensor:
    """`[N, 4, H, W]` premultiplied to `[N, 9, H, W]`: the sum of its product with `_channels` is by how much a sprite
    lowers the squared error.

    With image I, explained E, colours T (premultiplied) and alpha a that is |I - E|^2 - |I - T - (1 - a) E|^2.
    """
    colours, alpha = sprites[:, :3], sprites[:, 3:]
    energy = colours.square().sum(1, keepdim=True)
    return torch.cat([colours, alpha, -energy, alpha * colours, alpha.square()], 1)


def _levels(colours: Tensor) -> Tensor:
    """`[N, 3, H, W]` in [0, 1] to `[N, 3 * NUM_LEVELS, H, W]`: each channel's nearness to the two levels around it.

    The products of two colours' levels are 1 for equal channels and 0 for those two levels apart.
    """
    levels = torch.linspace(0, 1, NUM_LEVELS, device=colours.device)[:, None, None]
    distance = (colours[:, :, None] - levels).abs() * (NUM_LEVELS - 1)
    return (1 - distance).clamp(min=0).sqrt().flatten(1, 2)


def _back_channels(image: Tensor, explained: Tensor, is_open: Tensor) -> Tensor:
    """`[B, 3 * NUM_LEVELS + 1, H, W]`: what `_back_kernel` is multiplied with."""
    levels = _levels(image)
    same = (levels * _levels(explained)).sum(1, keepdim=True)
    return torch.cat([levels, same], 1) * is_open


def _back_kernel(sprites: Tensor) -> Tensor:
    """`[N, 4, H, W]` premultiplied to `[N, 3 * NUM_LEVELS + 1, H, W]`: the sum of its product with `_back_channels` is
    how many more channels have about their colour with a sprite than without."""
    alpha = sprites[:, 3:]
    return torch.cat([alpha * _levels(sprites[:, :3] / alpha.clamp(min=1e-3)), -alpha], 1)
