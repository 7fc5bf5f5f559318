"""Encoded prompts, kept while they are in use and after that for reuse: the cross-attention keys and values of a text.

On a GPU they lie side by side in one tensor per model, so that each row of a tick reads its own by slot and rows of
different requests share a call. On a CPU, where a copy costs less than a detour, each prompt has memory of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom import metrics
from darkroom.diffusion.loader import DiffusionModel


@dataclass(frozen=True)
class Prompt:
    """What identifies an encoded prompt. `is_negative` matters to models that zero an empty negative prompt."""

    text: str
    clip_skip: int
    is_negative: bool


@dataclass(eq=False)
class EncodedPrompt:
    """`text_kv` `[L, text_kv_width]`, K and V of every cross-attention layer; `pooled` `[P]` or None.

    `slot` is where `text_kv` lies in the model's `PromptCache.store`, None where there is no store. `references` counts
    who needs it now.
    """

    prompt: Prompt
    text_kv: Tensor
    pooled: Tensor | None
    slot: int | None
    references: int = 1

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.text_kv, self.pooled) if t is not None)


class PromptCache:
    """The prompts of one model: those in use, and the least recently used others up to `max_bytes`.

    With `batch_alone` each prompt is encoded by itself, so its bits cannot depend on its neighbours. With `num_in_use`
    there is a `store` `[num_slots, L, text_kv_width]` with room for that many prompts in use beside the `max_bytes` of
    others; its address never changes. Only the ticks' thread may call.
    """

    def __init__(
        self, model: DiffusionModel, max_bytes: int, *, batch_alone: bool, num_in_use: int | None = None
    ) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._batch_alone = batch_alone
        self._used: dict[Prompt, EncodedPrompt] = {}
        self._idle: OrderedDict[Prompt, EncodedPrompt] = OrderedDict()
        self._idle_bytes = 0
        self.store: Tensor | None = None
        self._free: list[int] = []
        if num_in_use is not None:
            shape = model.text.max_tokens, model.unet.text_kv_width
            slot_bytes = max(1, shape[0] * shape[1] * model.dtype.itemsize)
            num_slots = num_in_use + max_bytes // slot_bytes
            self.store = torch.zeros((num_slots, *shape), dtype=model.dtype, device=model.device)
            self._free = list(range(num_slots))[::-1]

    def has_room(self, prompts: Iterable[Prompt]) -> bool:
        """Whether `encode` would find a slot for each of these prompts now."""
        return self.store is None or len(self._used.keys() | set(prompts)) <= len(self.store)

    @torch.inference_mode()
    def encode(self, prompts: Iterable[Prompt]) -> dict[Prompt, EncodedPrompt]:
        """Encode `prompts`, those not held yet in as few text-encoder calls as may be.

        Each distinct prompt comes with one reference, which the caller gives back with `release`. Call it when
        `has_room`.
        """
        wanted = list(dict.fromkeys(prompts))
        found = {prompt: encoded for prompt in wanted if (encoded := self._find(prompt)) is not None}
        missing = [prompt for prompt in wanted if prompt not in found]
        metrics.PROMPT_CACHE.labels("hit").inc(len(found))
        metrics.PROMPT_CACHE.labels("miss").inc(len(missing))
        try:
            for group in self._groups(missing):
                found.update((encoded.prompt, encoded) for encoded in self._encode(group))
        except BaseException:
            self.release(found.values())
            raise
        return found

    def retain(self, encoded: Iterable[EncodedPrompt]) -> None:
        """Count one more user of each."""
        for entry in encoded:
            entry.references += 1

    def release(self, encoded: Iterable[EncodedPrompt]) -> None:
        """Give one reference of each back. What nobody needs any more is kept for reuse, within `max_bytes`."""
        for entry in encoded:
            entry.references -= 1
            if entry.references == 0:
                del self._used[entry.prompt]
                self._idle[entry.prompt] = entry
                self._idle_bytes += entry.num_bytes
        while self._idle_bytes > self._max_bytes:
            self._forget_oldest()

    def _find(self, prompt: Prompt) -> EncodedPrompt | None:
        encoded = self._used.get(prompt)
        if encoded is None and prompt in self._idle:
            encoded = self._used[prompt] = self._idle.pop(prompt)
            self._idle_bytes -= encoded.num_bytes
        if encoded is not None:
            encoded.references += 1
        return encoded

    def _forget_oldest(self) -> None:
        _, dropped = self._idle.popitem(last=False)
        self._idle_bytes -= dropped.num_bytes
        if dropped.slot is not None:
            self._free.append(dropped.slot)

    def _groups(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        if self._batch_alone:
            return [[prompt] for prompt in prompts]
        groups: dict[tuple[int, bool], list[Prompt]] = {}
        for prompt in prompts:
            groups.setdefault((prompt.clip_skip, prompt.is_negative), []).append(prompt)
        return list(groups.values())

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        model = self._model
        embeddings = model.text.encode(
            [prompt.text for prompt in prompts], clip_skip=prompts[0].clip_skip, negative=prompts[0].is_negative
        )
        stacked = torch.stack([embedding.prompt_embeds for embedding in embeddings])
        text_kv = model.unet.text_kv(stacked.to(model.device, model.dtype))
        result: list[EncodedPrompt] = []
        try:
            for prompt, embedding, own in zip(prompts, embeddings, text_kv, strict=True):
                # Each entry owns its memory: a view would keep the whole batch alive.
                pooled = embedding.pooled_prompt_embeds
                pooled = None if pooled is None else pooled.clone()
                slot, kept = self._keep(own)
                encoded = self._used[prompt] = EncodedPrompt(prompt, kept, pooled, slot)
                result.append(encoded)
        except BaseException:
            # Nobody will hear of these.
            for encoded in result:
                del self._used[encoded.prompt]
                if encoded.slot is not None:
                    self._free.append(encoded.slot)
            raise
        return result

    def _keep(self, text_kv: Tensor) -> tuple[int | None, Tensor]:
        if self.store is None:
            return None, text_kv.clone()
        if not self._free:
            self._forget_oldest()
        # Taken only when it is filled: a copy may fail.
        slot = self._free[-1]
        self.store[slot].copy_(text_kv)
        self._free.pop()
        return slot, self.store[slot]
