"""Teach the text encoder to tell the scene from its caption: `python -m training.train_text --out RUN`.

Learned from the denoiser's loss alone, the words for objects take thousands of updates to matter, since most
positions of a short prompt are padding that hardly carries them. Here every position from the end mark on must tell
the objects, their relation and the background, so the denoiser finds them wherever it looks. Takes minutes.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training import common
from training.recipes import RECIPES
from training.scenes import NUM_CLASSES, make_scenes
from training.tokenizer import MAX_TOKENS, tokenizer_of
from training.trainer import Trainer

HELD_OUT_SEED = 1_000_003


def build_text_encoder(tokenizer: CLIPTokenizer, sizes: dict[str, int]) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        **sizes,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def answer_loss(logits: Tensor, targets: Tensor, is_padding: Tensor) -> Tensor:
    """Mean cross-entropy. `logits` `[B, L, sum of classes]`, `targets` `[B, 7]`, `is_padding` `[B, L]` bool."""
    rows, columns = is_padding.nonzero(as_tuple=True)
    parts = logits[rows, columns].float().split(NUM_CLASSES, dim=-1)
    return torch.stack([F.cross_entropy(part, targets[rows, index]) for index, part in enumerate(parts)]).sum()


@torch.no_grad()
def answered(logits: Tensor, targets: Tensor) -> list[float]:
    """Share of right answers, one for each question. `logits` `[B, sum of classes]`, of one position of each text."""
    parts = logits.float().split(NUM_CLASSES, dim=-1)
    return [float((part.argmax(-1) == targets[:, index]).float().mean()) for index, part in enumerate(parts)]


def parser() -> argparse.ArgumentParser:
    return common.run_parser(__doc__.splitlines()[0], lr=1e-3)


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    recipe = RECIPES[args.recipe]
    world, amount = recipe.world, recipe.amounts["text"]
    batch_size = args.batch_size or amount.batch
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = tokenizer_of(args.out, world)
    # At once: a run that goes on keeps its words' ids, whatever the captions have become.
    tokenizer.save_pretrained(args.out / "tokenizer")
    scenes = make_scenes(world, args.seed, args.scenes or amount.scenes, 2, tokenizer).to(device)
    held_out = make_scenes(world, HELD_OUT_SEED, 2048, 1, tokenizer).to(device)
    encoder = build_text_encoder(tokenizer, recipe.text)
    head = nn.Linear(recipe.text["hidden_size"], sum(NUM_CLASSES))
    taught = nn.ModuleDict({"encoder": encoder, "head": head}).to(device)
    trainer = Trainer(args, taught, weight_decay=0.01, num_scenes=len(scenes), batch_size=batch_size)
    generator = trainer.generator

    def batch_loss() -> Tensor:
        picks = torch.randint(len(scenes), (batch_size,), generator=generator, device=device)
        tellings = torch.randint(2, (batch_size,), generator=generator, device=device)
        token_ids = scenes.token_ids[tellings, picks].long()
        with common.autocast(device):
            logits = head(encoder(token_ids).last_hidden_state)
        return answer_loss(logits, scenes.answers[picks].long(), token_ids == tokenizer.eos_token_id)

    trainer.run(batch_loss)
    with torch.no_grad(), trainer.averaged():
        # The last position is padding in all but the longest captions.
        told = head(encoder(held_out.token_ids[0].long()).last_hidden_state[:, -1])
        right = answered(told, held_out.answers.long())
        names = ("first", "second", "third", "relation", "number", "background", "scale")
        print("right answers:", ", ".join(f"{name} {share:.3f}" for name, share in zip(names, right, strict=True)))
        encoder.save_pretrained(args.out)
    trainer.finish()


if __name__ == "__main__":
    main()
