"""A CLIP tokenizer whose merges are learned from the world's own captions."""

from __future__ import annotations

import json
import random

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from training import world

MAX_TOKENS = 32
NUM_MERGES = 400
# CLIP's own split: contractions, words, single digits, runs of other signs.
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def build_tokenizer(num_captions: int = 20_000) -> CLIPTokenizer:
    """Train byte-pair merges on captions. Ids as in CLIP: bytes, bytes with `</w>`, merges, then the two marks."""
    rng = random.Random("captions")
    captions = [world.caption(world.sample_scene(rng), rng) for _ in range(num_captions)]
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
