"""Encoded prompts, kept for reuse: text embeddings and their cross-attention keys and values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from darkroom.diffusion.loader import DiffusionModel


@dataclass(frozen=True)
class Prompt:
    """What identifies an encoded prompt. `is_negative` matters to models that zero an empty negative prompt."""

    text: str
    clip_skip: int
    is_negative: bool


@dataclass(frozen=True)
class EncodedPrompt:
    """`text_kv` `[L, text_kv_width]`, K and V of every cross-attention layer; `pooled` `[P]` or None."""

    text_kv: torch.Tensor
    pooled: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.text_kv, self.pooled) if t is not None)


class PromptCache:
    """Least recently used prompts of one model, bounded in bytes.

    With `batch_alone` each prompt is encoded by itself, so its bits cannot depend on its neighbours.
    """

    def __init__(self, model: DiffusionModel, max_bytes: int, *, batch_alone: bool) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._batch_alone = batch_alone
        self._entries: OrderedDict[Prompt, EncodedPrompt] = OrderedDict()
        self._num_bytes = 0
        self.hits = 0
        self.misses = 0

    def encode(self, prompts: Sequence[Prompt]) -> dict[Prompt, EncodedPrompt]:
        """Encode `prompts`, those not held yet in as few text-encoder calls as may be."""
        wanted = list(dict.fromkeys(prompts))
        found = {prompt: self._entries[prompt] for prompt in wanted if prompt in self._entries}
        missing = [prompt for prompt in wanted if prompt not in found]
        self.hits += len(found)
        self.misses += len(missing)
        for prompt in found:
            self._entries.move_to_end(prompt)
        for group in self._groups(missing):
            for prompt, encoded in zip(group, self._encode(group), strict=True):
                found[prompt] = encoded
                self._keep(prompt, encoded)
        return found

    def _groups(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        if self._batch_alone:
            return [[prompt] for prompt in prompts]
        groups: dict[tuple[int, bool], list[Prompt]] = {}
        for prompt in prompts:
            groups.setdefault((prompt.clip_skip, prompt.is_negative), []).append(prompt)
        return list(groups.values())

    def _encode(self, prompts: list[Prompt]) -> list[EncodedPrompt]:
        model = self._model
        embeddings = model.text.encode(
            [prompt.text for prompt in prompts], clip_skip=prompts[0].clip_skip, negative=prompts[0].is_negative
        )
        stacked = torch.stack([embedding.prompt_embeds for embedding in embeddings])
        text_kv = model.unet.text_kv(stacked.to(model.device, model.dtype))
        # Each entry owns its memory: a view would keep the whole batch alive.
        return [
            EncodedPrompt(
                text_kv[i].clone(),
                None if embedding.pooled_prompt_embeds is None else embedding.pooled_prompt_embeds.clone(),
            )
            for i, embedding in enumerate(embeddings)
        ]

    def _keep(self, prompt: Prompt, encoded: EncodedPrompt) -> None:
        if encoded.num_bytes > self._max_bytes:
            return
        self._entries[prompt] = encoded
        self._num_bytes += encoded.num_bytes
        while self._num_bytes > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._num_bytes -= dropped.num_bytes
