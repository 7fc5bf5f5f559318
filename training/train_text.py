"""Teach the text encoder to tell the scene from its caption: `python -m training.train_text --out RUN`.

Learned from the denoiser's loss alone, the words for objects take thousands of updates to matter, since most
positions of a short prompt are padding that hardly carries them. Here every position from the end mark on must tell
the objects, their relation and the background, so the denoiser finds them wherever it looks. Takes minutes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training import common, world
from training.tokenizer import MAX_TOKENS, build_tokenizer

TEXT_WIDTH = 192
RELATIONS = ("", "left", "above", "riding")
SCALES = ("", "small", "big")
# Classes of each answer: first object, second object or none, relation, background, scale.
NUM_CLASSES = (len(world.OBJECTS), len(world.OBJECTS) + 1, len(RELATIONS), len(world.BACKGROUNDS), len(SCALES))


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return ids `[N, L]` int64, padded and cut to the model's length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def answers(scene: world.Scene) -> list[int]:
    """Return the class of each answer about a scene."""
    names = list(world.OBJECTS)
    places = [names.index(placed.name) for placed in scene.objects]
    second = places[1] if len(places) == 2 else len(names)
    background = world.BACKGROUNDS.index(scene.background)
    return [places[0], second, RELATIONS.index(scene.relation), background, SCALES.index(scene.scale)]


def answer_loss(logits: Tensor, targets: Tensor, is_padding: Tensor) -> Tensor:
    """Mean cross-entropy. `logits` `[B, L, sum of classes]`, `targets` `[B, 5]`, `is_padding` `[B, L]` bool."""
    rows, columns = is_padding.nonzero(as_tuple=True)
    parts = logits[rows, columns].float().split(NUM_CLASSES, dim=-1)
    return torch.stack([F.cross_entropy(part, targets[rows, index]) for index, part in enumerate(parts)]).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--updates", type=int, default=450)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(tokenizer)
    head = nn.Linear(TEXT_WIDTH, sum(NUM_CLASSES))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    progress = common.Progress(None, args.updates)
    rng = random.Random(f"text-{args.seed}")
    bar = tqdm(total=args.updates, desc="text", mininterval=5)
    while not progress.finished:
        common.follow_cpu_share()
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(progress, args.lr, warmup_updates=30)
        scenes = [world.sample_scene(rng) for _ in range(args.batch_size)]
        token_ids = tokenize(tokenizer, [world.caption(scene, rng) for scene in scenes])
        targets = torch.tensor([answers(scene) for scene in scenes])
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(encoder(token_ids).last_hidden_state)
        loss = answer_loss(logits, targets, token_ids == tokenizer.eos_token_id)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.done_updates += 1
        bar.update()
        bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    bar.close()
    encoder.save_pretrained(args.out)
    common.write_record(args.out, progress, args.batch_size, common.device_name(torch.device("cpu")))
    common.CsvLog(args.out / "log.csv").write(updates=progress.done_updates, loss=float(loss))


if __name__ == "__main__":
    main()
