"""Teach the text encoder to tell the scene from its caption: `python -m training.train_text --out RUN`.

Learned from the denoiser's loss alone, the words for objects take thousands of updates to matter, since most
positions of a short prompt are padding that hardly carries them. Here every position from the end mark on must tell
the objects, their relation and the background, so the denoiser finds them wherever it looks. Takes minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training import common
from training.recipes import RECIPES, add_recipe
from training.scenes import NUM_CLASSES, make_scenes
from training.tokenizer import MAX_TOKENS, build_tokenizer

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_recipe(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, help="length of the run in training time")
    parser.add_argument("--updates", type=int, help="length of the run in updates")
    parser.add_argument("--scenes", type=int, help="scenes whose captions are made once; default: the recipe's")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report-every", type=int, default=50, help="updates between log rows")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    recipe = RECIPES[args.recipe]
    world, amount = recipe.world, recipe.amounts["text"]
    batch_size = args.batch_size or amount.batch
    tokenizer = build_tokenizer(world)
    scenes = make_scenes(world, args.seed, args.scenes or amount.scenes, tellings=2).to(device)
    held_out = make_scenes(world, HELD_OUT_SEED, 2048, tellings=1).to(device)
    encoder = build_text_encoder(tokenizer, recipe.text).to(device)
    head = nn.Linear(recipe.text["hidden_size"], sum(NUM_CLASSES)).to(device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    progress = common.Progress(args.minutes, args.updates)
    args.out.mkdir(parents=True, exist_ok=True)
    log = common.CsvLog(args.out / "log.csv", fresh=True)
    generator = torch.Generator().manual_seed(args.seed)
    bar = tqdm(total=args.updates, desc="text", mininterval=5)

    def report() -> None:
        log.write(updates=progress.done_updates, minutes=round(progress.elapsed_minutes, 2), loss=loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    while not progress.stopping:
        common.follow_cpu_share()
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(progress, args.lr, warmup_updates=50)
        picks = torch.randint(len(scenes), (batch_size,), generator=generator).to(device)
        tellings = torch.randint(2, (batch_size,), generator=generator).to(device)
        token_ids = scenes.token_ids[tellings, picks].long()
        with common.autocast(device):
            logits = head(encoder(token_ids).last_hidden_state)
        loss = answer_loss(logits, scenes.answers[picks].long(), token_ids == tokenizer.eos_token_id)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.done_updates += 1
        bar.update()
        if progress.done_updates % args.report_every == 0:
            report()
    report()
    bar.close()
    with torch.no_grad():
        # The last position is padding in all but the longest captions.
        told = head(encoder(held_out.token_ids[0].long()).last_hidden_state[:, -1])
    right = answered(told, held_out.answers.long())
    names = ("first", "second", "third", "relation", "number", "background", "scale")
    print("right answers:", ", ".join(f"{name} {share:.3f}" for name, share in zip(names, right, strict=True)))
    encoder.cpu().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out / "tokenizer")
    common.write_record(args.out, progress, common.record_of(args, len(scenes), batch_size))
    log.plot("loss")
    if progress.finished:
        common.finish(args.out)


if __name__ == "__main__":
    main()
