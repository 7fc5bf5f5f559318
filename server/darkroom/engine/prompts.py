"""Encoded prompts, kept while they are in use and after that for reuse: the cross-attention keys and values of a text.

On a GPU they lie side by side in one tensor per model, so that each row of a tick reads its own by slot and rows of
different requests share a call. On a CPU, where a copy costs less than a detour, each prompt has memory of its own.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from darkroom import metrics
from darkroom.diffusion.loader import DiffusionModel
from darkroom.errors import JobError


@dataclass(frozen=True)
class Prompt:
    """What identifies an encoded prompt. `is_negative` matters to models that zero an empty negative prompt;
    `is_weighted` ones are read as `darkroom.diffusion.emphasis` says and may be several chunks long."""

    text: str
    clip_skip: int
    is_negative: bool
    is_weighted: bool = False


@dataclass(eq=False)
class EncodedPrompt:
    """`chunks` of `[L, text_kv_width]`, K and V of every cross-attention layer; `pooled` `[P]` or None.

    `slots` are where the chunks lie in the model's `PromptCache.store`, none where there is no store. `references`
    counts who needs it now.
    """

    prompt: Prompt
    chunks: tuple[Tensor, ...]
    pooled: Tensor | None
    slots: tuple[int, ...]
    references: int = 1

    @property
    def text_kv(self) -> Tensor:
        """All chunks, `[n * L, text_kv_width]`; a copy where there are several."""
        return self.chunks[0] if len(self.chunks) == 1 else torch.cat(self.chunks)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.chunks, self.pooled) if t is not None)


class PromptCache:
    """The prompts of one model: those in use, and the least recently used others up to `max_bytes`.

    With `batch_alone` each prompt is encoded by itself, so its bits cannot depend on its neighbours. With `num_in_use`
    there is a `store` `[num_slots, L, text_kv_width]` with room for that many chunks in use beside the `max_bytes` of
    others; its address never changes. No prompt may have more than `max_chunks`, nor more than half of what the store
    holds. Only the ticks' thread may call.
    """

    def __init__(
        self,
        model: DiffusionModel,
        max_bytes: int,
        *,
        batch_alone: bool,
        num_in_use: int | None = None,
        max_chunks: int | None = None,
    ) -> None:
        self._model = model
        self._max_chunks = sys.maxsize if max_chunks is None else max_chunks
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
            # So that a job's two prompts always find room.
            self._max_chunks = min(self._max_chunks, num_slots // 2)
            self.store = torch.zeros((num_slots, *shape), dtype=model.dtype, device=model.device)
            self._free = list(range(num_slots))[::-1]

    def has_room(self, prompts: Iterable[Prompt]) -> bool:
        """Whether `encode` would find a slot for each of these prompts now."""
        if self.store is None:
            return True
        return sum(map(self._num_chunks, self._used.keys() | set(prompts))) <= len(self.store)

    def _num_chunks(self, prompt: Prompt) -> int:
        # One that is too long is refused when it is encoded, and takes no place.
        return min(self._max_chunks, self._model.text.num_chunks(prompt.text)) if prompt.is_weighted else 1

    @torch.inference_mode()
    def encode(self, prompts: Iterable[Prompt]) -> dict[Prompt, EncodedPrompt]:
        """Encode `prompts`, those not held yet in as few text-encoder calls as may be.

        Each distinct prompt comes with one reference, which the caller gives back with `release`. Call it when
        `has_room`. Raises `JobError` (prompt_too_long) when one of them has too many chunks.
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
        self._free += dropped.slots

    def _groups(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        if self._batch_alone:
            return [[prompt] for prompt in prompts]
        groups: dict[tuple[int, bool, bool], list[Prompt]] = {}
        for prompt in prompts:
            groups.setdefault((prompt.clip_skip, prompt.is_negative, prompt.is_weighted), []).append(prompt)
        return list(groups.values())

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        model, first = self._model, prompts[0]
        if first.is_weighted:
            self._check_lengths(prompts)
        embeddings = model.text.encode(
            [prompt.text for prompt in prompts],
            clip_skip=first.clip_skip,
            negative=first.is_negative,
            weighted=first.is_weighted,
        )
        # All chunks in one call, whatever prompt they are of.
        embeds = torch.cat([embedding.prompt_embeds for embedding in embeddings])
        chunks = embeds.view(-1, model.text.max_tokens, embeds.shape[-1])
        text_kv = iter(model.unet.text_kv(chunks.to(model.device, model.dtype)))
        result: list[EncodedPrompt] = []
        try:
            for prompt, embedding in zip(prompts, embeddings, strict=True):
                # Each entry owns its memory: a view would keep the whole batch alive.
                pooled = embedding.pooled_prompt_embeds
                pooled = None if pooled is None else pooled.clone()
                own = islice(text_kv, len(embedding.prompt_embeds) // model.text.max_tokens)
                slots, kept = self._keep(list(own))
                encoded = self._used[prompt] = EncodedPrompt(prompt, kept, pooled, slots)
                result.append(encoded)
        except BaseException:
            # Nobody will hear of these.
            for encoded in result:
                del self._used[encoded.prompt]
                self._free += encoded.slots
            raise
        return result

    def _check_lengths(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if (num_chunks := self._model.text.num_chunks(prompt.text)) > self._max_chunks:
                name = "negative_prompt" if prompt.is_negative else "prompt"
                raise JobError(
                    f"{name}: got {num_chunks} chunks of {self._model.text.max_tokens - 2} tokens, expected at most "
                    f"{self._max_chunks}",
                    code="prompt_too_long",
                )

    def _keep(self, chunks: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
        if self.store is None:
            return (), tuple(chunk.clone() for chunk in chunks)
        while len(self._free) < len(chunks):
            self._forget_oldest()
        # Taken only when they are filled: a copy may fail.
        slots = tuple(self._free[: -len(chunks) - 1 : -1])
        for slot, chunk in zip(slots, chunks, strict=True):
            self.store[slot].copy_(chunk)
        del self._free[-len(chunks) :]
        return slots, tuple(self.store[slot] for slot in slots)
