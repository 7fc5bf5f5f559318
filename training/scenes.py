"""Very many scenes as numbers, made by all cores: what the training runs learn from."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from training import common
from training.captions import caption
from training.painting import Painter, pack_layers
from training.tokenizer import MAX_TOKENS, tokenize
from training.world import BACKGROUNDS, IMAGE_PX, MAX_OBJECTS, RELATIONS, SCALES, SPRITES, Scene, World, scene_at

# Classes of each answer about a scene: first, second and third sprite or none, relation, number of objects,
# background, scale.
NUM_CLASSES = (
    len(SPRITES),
    len(SPRITES) + 1,
    len(SPRITES) + 1,
    len(RELATIONS),
    MAX_OBJECTS,
    len(BACKGROUNDS),
    len(SCALES),
)
CHUNK = 4096


@dataclass
class SceneSet:
    """Scenes 0..N-1 of a series of a world.

    `layers` `[N, MAX_OBJECTS, 5]` and `backgrounds` `[N]` int16 are a `Painter`'s; `token_ids` `[T, N, L]` int16 are T
    captions of each; `answers` `[N, 7]` int16 are classes (`NUM_CLASSES`); `alone` `[N]` marks scenes of one object.
    """

    world: World
    layers: Tensor
    backgrounds: Tensor
    token_ids: Tensor
    answers: Tensor
    alone: Tensor

    def __len__(self) -> int:
        return len(self.alone)

    def to(self, device: torch.device) -> SceneSet:
        return SceneSet(self.world, *(getattr(self, field.name).to(device) for field in fields(self)[1:]))

    def pictures(self, painter: Painter, picks: Tensor) -> Tensor:
        """Paint scenes `picks` `[B]`. Returns `[B, 3, H, W]` fp32 in [-1, 1], channels last in memory."""
        pictures = common.to_tensor(painter.paint(self.layers[picks], self.backgrounds[picks]))
        return F.avg_pool2d(pictures, IMAGE_PX // self.world.image_px)


def answers(scene: Scene) -> list[int]:
    """Return the class of each answer about a scene."""
    names = [placed.name for placed in scene.objects]
    if scene.relation == "count":
        names = names[:1]
    places = [SPRITES.index(name) for name in names] + [len(SPRITES)] * (3 - len(names))
    return [
        *places,
        RELATIONS.index(scene.relation),
        len(scene.objects) - 1,
        BACKGROUNDS.index(scene.background),
        SCALES.index(scene.scale),
    ]


def make_scenes(
    world: World, seed: int, num_scenes: int, tellings: int = 0, tokenizer: CLIPTokenizer | None = None
) -> SceneSet:
    """Draw the first `num_scenes` of the series `seed`, in a process for each core; with a tokenizer, each gets
    `tellings` captions."""
    bounds = [(start, min(start + CHUNK, num_scenes)) for start in range(0, num_scenes, CHUNK)]
    jobs = [(world, seed, start, end, tellings, tokenizer) for start, end in bounds]
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    if workers == 1:
        parts = [_chunk(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
            parts = list(
                tqdm(pool.map(_chunk, *zip(*jobs, strict=True)), total=len(jobs), desc="scenes", mininterval=5)
            )
    layers, backgrounds, token_ids, told, alone = zip(*parts, strict=True)
    joined = (np.concatenate(layers), np.concatenate(backgrounds), np.concatenate(token_ids, axis=1))
    return SceneSet(world, *(torch.from_numpy(part) for part in (*joined, np.concatenate(told), np.concatenate(alone))))


def batches(num: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, num, size))


def _begin() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _chunk(
    world: World, seed: int, start: int, end: int, tellings: int, tokenizer: CLIPTokenizer | None
) -> tuple[np.ndarray, ...]:
    scenes = [scene_at(seed, index, world=world) for index in range(start, end)]
    layers, backgrounds = pack_layers(scenes)
    token_ids = np.zeros((tellings if tokenizer else 0, len(scenes), MAX_TOKENS), np.int16)
    for telling, ids in enumerate(token_ids):
        rng = random.Random(f"captions-{seed}-{telling}-{start}")
        captions = [caption(scene, rng) for scene in scenes]
        ids[:] = tokenize(tokenizer, captions).numpy()
    told = np.array([answers(scene) for scene in scenes], np.int16)
    return layers, backgrounds, token_ids, told, np.array([not scene.relation for scene in scenes])
