"""Prompts to embeddings: CLIP's tokenizer and text encoders, from transformers.

transformers takes seconds to import, so it is imported where it is first needed and not with this module.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.diffusion.config import positive_int
from darkroom.diffusion.emphasis import Chunk, chunked, emphasise, parse
from darkroom.errors import InvalidRequest, ModelError

MAX_LAYERS = 256


@dataclass(frozen=True)
class TextEmbedding:
    """One prompt: `prompt_embeds` `[L, D]`, and SDXL's `pooled_prompt_embeds` `[P]` or None."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None


@functools.cache
def _transformers() -> Any:
    """transformers, told to keep quiet: its hints concern training and end up in a server's log."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def build_text_model(config: Mapping[str, Any], class_name: str) -> nn.Module:
    """Build transformers' `CLIPTextModel` or `CLIPTextModelWithProjection` from its config, on the current device.

    Raises `ModelError` on a config that transformers refuses.
    """
    if class_name not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ModelError(f"text encoder class {class_name} is not supported")
    positive_int(config, "num_hidden_layers", 12, limit=MAX_LAYERS)
    transformers = _transformers()
    # Newer or older files may say things that this class does not know; only what it declares reaches it.
    known = {*transformers.CLIPTextConfig().to_dict(), "use_attention_mask"}
    try:
        parsed = transformers.CLIPTextConfig(**{key: value for key, value in config.items() if key in known})
        model: nn.Module = getattr(transformers, class_name)(parsed)
    except Exception as error:
        # The config classes raise their own kinds of error, which derive from Exception alone.
        raise ModelError(f"not a usable {class_name} config: {_one_line(error)}") from error
    return model


def load_tokenizer(directory: Path) -> Any:
    """Read a `CLIPTokenizer` from its files. Raises `ModelError` naming the directory."""
    if not any((directory / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise ModelError(f"{directory}: neither vocab.json nor tokenizer.json is there")
    try:
        return _transformers().CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # A damaged vocabulary surfaces as whatever its reader stumbles over, from OSError to a Rust panic's wrapper.
        raise ModelError(f"{directory}: not a usable CLIP tokenizer: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def clean_text(prompt: str) -> str:
    """Make a prompt encodable: lone surrogates become U+FFFD, split pairs are joined."""
    return prompt.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _upload(tokens: Tensor, device: torch.device) -> Tensor:
    """From pageable memory the host would wait for everything that is enqueued on a GPU."""
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)


class TextEncoder:
    """One tokenizer and its encoder. `model` is in eval mode, on its device, with loaded weights."""

    def __init__(self, tokenizer: Any, model: nn.Module):
        config: Any = model.config
        self.tokenizer, self.model = tokenizer, model
        # A projection wraps the encoder itself.
        self.body: Any = getattr(model, "text_model", model)
        self.uses_attention_mask = bool(getattr(config, "use_attention_mask", False))
        self.width = int(config.hidden_size)
        self.num_layers = int(config.num_hidden_layers)
        self.max_tokens = int(min(tokenizer.model_max_length, config.max_position_embeddings))
        self.pooled_width = int(config.projection_dim) if self.body is not model else None
        if len(tokenizer) > config.vocab_size:
            raise ModelError(
                f"the tokenizer knows {len(tokenizer)} tokens and the text encoder embeds only {config.vocab_size}"
            )

        self._comma = tokenizer.get_vocab().get(",</w>")
        self._chunks = functools.lru_cache(1024)(self._cut)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask `[B, max_tokens]` of prompts, cut or padded to that."""
        tokens = self.tokenizer(
            [clean_text(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids, tokens.attention_mask

    def chunks(self, prompt: str) -> tuple[Chunk, ...]:
        """A prompt with weights, in chunks of `max_tokens` less the start and the end."""
        return self._chunks(prompt)

    def _cut(self, prompt: str) -> tuple[Chunk, ...]:
        def tokenize(texts: list[str]) -> list[list[int]]:
            ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
            return ids

        return tuple(chunked(parse(clean_text(prompt)), tokenize, self.max_tokens - 2, self._comma))

    def tokens_of(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, attention mask and weights `[B, max_tokens]` of chunks, each with its start, end and padding."""
        ids = torch.full((len(chunks), self.max_tokens), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        weights = torch.ones(ids.shape)
        for row, chunk in enumerate(chunks):
            end = len(chunk.tokens) + 1
            line = [self.tokenizer.bos_token_id, *chunk.tokens, self.tokenizer.eos_token_id]
            ids[row, : end + 1] = torch.tensor(line)
            mask[row, : end + 1] = 1
            weights[row, 1:end] = torch.tensor(chunk.weights)
        return ids, mask, weights

    def __call__(self, tokens: Tensor, mask: Tensor, *, all_layers: bool) -> tuple[Any, Any]:
        """Run tokens `[B, max_tokens]`. Returns the encoder's output and, with a projection, the pooled embeddings
        `[B, P]`, else None."""
        device = self.body.final_layer_norm.weight.device
        seen = _upload(mask, device) if self.uses_attention_mask else None
        output = self.model(_upload(tokens, device), attention_mask=seen, output_hidden_states=all_layers)
        return output, getattr(output, "text_embeds", None)


class TextEncoders:
    """The text side of a checkpoint: one encoder (SD 1.x, 2.x) or two side by side (SDXL).

    `zero_empty_negative` is SDXL's `force_zeros_for_empty_prompt`: an empty negative prompt embeds as zeros.
    """

    def __init__(self, encoders: Sequence[TextEncoder], *, zero_empty_negative: bool = False):
        self.encoders = tuple(encoders)
        self.zero_empty_negative = zero_empty_negative
        self.is_sdxl = encoders[-1].pooled_width is not None
        self.width = sum(encoder.width for encoder in encoders)
        self.pooled_width = encoders[-1].pooled_width
        self.max_tokens = encoders[0].max_tokens
        if any(encoder.max_tokens != self.max_tokens for encoder in encoders):
            raise ModelError("the text encoders take different numbers of tokens")

    @property
    def max_clip_skip(self) -> int:
        """Most layers that `clip_skip` may leave out; one always remains."""
        return max(0, min(encoder.num_layers for encoder in self.encoders) - (2 if self.is_sdxl else 1))

    def num_chunks(self, prompt: str) -> int:
        """How many times `max_tokens` the embedding of a prompt with weights is long."""
        return max(len(encoder.chunks(prompt)) for encoder in self.encoders)

    @torch.inference_mode()
    def encode(
        self, prompts: Sequence[str], clip_skip: int = 0, *, negative: bool = False, weighted: bool = False
    ) -> list[TextEmbedding]:
        """Embed prompts, each on its own.

        They are cut at `max_tokens`, or with `weighted` read as `emphasis` says, and then as long as they need to be:
        L is a multiple of `max_tokens`, and what is pooled comes from the first chunk.

        `clip_skip` leaves out that many layers at the end. `negative=True` says that these are negative prompts, which
        are zeroed when empty if the checkpoint asks for it, and as in diffusers are never skipped; weighted ones are,
        as in AUTOMATIC1111. Raises `InvalidRequest` on a `clip_skip` out of range.
        """
        if not 0 <= clip_skip <= self.max_clip_skip:
            raise InvalidRequest("clip_skip", clip_skip, f"0 to {self.max_clip_skip}")
        if not prompts:
            return []
        if negative and not weighted:
            clip_skip = 0
        counts = [self.num_chunks(prompt) if weighted else 1 for prompt in prompts]
        parts, pooled = [], None
        for encoder in self.encoders:
            if weighted:
                hidden, pooled = self._encode_weighted(encoder, prompts, counts, clip_skip)
            else:
                hidden, pooled = self._run(encoder, *encoder.tokens(prompts), clip_skip)
            parts.append(hidden)
        embeds = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        result, first = [], 0
        for prompt, count in zip(prompts, counts, strict=True):
            own = embeds[first : first + count].flatten(0, 1)
            embedding = TextEmbedding(own, None if pooled is None else pooled[first])
            if negative and not prompt and self.zero_empty_negative:
                zeros = None if pooled is None else torch.zeros_like(pooled[first])
                embedding = TextEmbedding(torch.zeros_like(own), zeros)
            result.append(embedding)
            first += count
        return result

    def _encode_weighted(
        self, encoder: TextEncoder, prompts: Sequence[str], counts: Sequence[int], clip_skip: int
    ) -> tuple[Tensor, Any]:
        """The chunks of all prompts, `counts` of each: `[C, max_tokens, D]`, and what is pooled of them."""
        chunks: list[Chunk] = []
        for prompt, count in zip(prompts, counts, strict=True):
            own = encoder.chunks(prompt)
            chunks += [*own, *[Chunk()] * (count - len(own))]
        tokens, mask, weights = encoder.tokens_of(chunks)
        hidden, pooled = self._run(encoder, tokens, mask, clip_skip)
        if any(chunk.is_weighted for chunk in chunks):
            hidden = emphasise(hidden, _upload(weights, hidden.device))
        return hidden, pooled

    def _run(self, encoder: TextEncoder, tokens: Tensor, mask: Tensor, clip_skip: int) -> tuple[Tensor, Any]:
        output, pooled = encoder(tokens, mask, all_layers=self.is_sdxl or clip_skip > 0)
        if self.is_sdxl:
            # SDXL was trained on the last layer but one, without the final norm.
            return output.hidden_states[-(clip_skip + 2)], pooled
        if clip_skip:
            return encoder.body.final_layer_norm(output.hidden_states[-(clip_skip + 1)]), pooled
        return output.last_hidden_state, pooled
