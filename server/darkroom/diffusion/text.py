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

    def __call__(self, prompts: Sequence[str], *, all_layers: bool) -> tuple[Any, Any]:
        """Run prompts, cut or padded to `max_tokens`. Returns the encoder's output and, with a projection, the pooled
        embeddings `[B, P]`, else None.
        """
        tokens = self.tokenizer(
            [clean_text(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        device = self.body.final_layer_norm.weight.device
        mask = _upload(tokens.attention_mask, device) if self.uses_attention_mask else None
        output = self.model(_upload(tokens.input_ids, device), attention_mask=mask, output_hidden_states=all_layers)
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

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], clip_skip: int = 0, *, negative: bool = False) -> list[TextEmbedding]:
        """Embed prompts, each on its own; longer ones are cut at `max_tokens`.

        `clip_skip` leaves out that many layers at the end. `negative=True` says that these are negative prompts, which
        as in diffusers are never skipped, and zeroed when empty if the checkpoint asks for it. Raises `InvalidRequest`
        on a `clip_skip` out of range.
        """
        if not 0 <= clip_skip <= self.max_clip_skip:
            raise InvalidRequest("clip_skip", clip_skip, f"0 to {self.max_clip_skip}")
        if not prompts:
            return []
        if negative:
            clip_skip = 0
        parts, pooled = [], None
        for encoder in self.encoders:
            output, pooled = encoder(prompts, all_layers=self.is_sdxl or clip_skip > 0)
            if self.is_sdxl:
                # SDXL was trained on the last layer but one, without the final norm.
                parts.append(output.hidden_states[-(clip_skip + 2)])
            elif clip_skip:
                parts.append(encoder.body.final_layer_norm(output.hidden_states[-(clip_skip + 1)]))
            else:
                parts.append(output.last_hidden_state)
        embeds = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        result = []
        for index, prompt in enumerate(prompts):
            embedding = TextEmbedding(embeds[index], None if pooled is None else pooled[index])
            if negative and not prompt and self.zero_empty_negative:
                zeros = None if pooled is None else torch.zeros_like(pooled[index])
                embedding = TextEmbedding(torch.zeros_like(embeds[index]), zeros)
            result.append(embedding)
        return result
