"""A CLIP tokenizer whose merges are learned from the world's own captions."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from training.captions import caption
from training.world import World, sample_scene

MAX_TOKENS = 48
NUM_MERGES = 600
# CLIP's own split: contractions, words, single digits, runs of other signs.
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def build_tokenizer(world: World, num_captions: int = 20_000) -> CLIPTokenizer:
    """Train byte-pair merges on a world's captions. Ids as in CLIP: bytes, bytes with `</w>`, merges, the two marks."""
    rng = random.Random("captions")
    captions = [caption(sample_scene(rng, world=world), rng) for _ in range(num_captions)]
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(CLIP_SPLIT), "removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) * 2 + NUM_MERGES,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tokenizer_of(run: Path, world: World) -> CLIPTokenizer:
    """The tokenizer of a `train_text` run: what it has saved, or, before that, what it is going to."""
    saved = run / "tokenizer"
    return CLIPTokenizer.from_pretrained(saved) if saved.exists() else build_tokenizer(world)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return ids `[N, L]` int64, padded and cut to the model's length, as the tokenizer's own call does but faster."""
    ids = np.full((len(captions), MAX_TOKENS), tokenizer.pad_token_id, np.int64)
    for row, encoding in zip(ids, tokenizer.backend_tokenizer.encode_batch_fast(captions), strict=True):
        kept = encoding.ids[:MAX_TOKENS]
        row[: len(kept)] = kept
        row[-1] = tokenizer.eos_token_id
    return torch.from_numpy(ids)
