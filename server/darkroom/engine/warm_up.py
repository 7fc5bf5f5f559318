"""What an engine does before its first job, so that no caller pays for first calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from darkroom_kernels import check_kernels

from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.batcher import BatchKey
from darkroom.engine.decode import Decoder
from darkroom.engine.joining import key_of
from darkroom.engine.lane import Lane
from darkroom.errors import ConfigError
from darkroom.jobs import GenerationRequest

Sizes = Sequence[tuple[int, int]]


def turn_away_from_wrong_kernels(models: Iterable[DiffusionModel], kernels: str) -> None:
    """Turn away from kernels that are wrong on a model's device. A warm-up does so before graphs hold them."""
    for model in models:
        if model.device.type == "cuda":
            check_kernels(model.device, model.dtype, model.unet.config.head_dims, kernels=kernels)
            check_kernels(model.device, model.vae.dtype, [])


def capture_ticks(
    models: Iterable[DiffusionModel],
    sizes_px: Sizes,
    lane_of: Callable[[BatchKey], Lane],
    buckets: Sequence[int],
    should_stop: Callable[[], bool],
) -> None:
    """Capture the ticks of each model's own size, and of `sizes_px`. Raises `ConfigError` on a size that is none of a
    model's."""
    for model, width, height in _prepared(models, sizes_px):
        multiple = model.card.size_multiple
        if width % multiple or height % multiple:
            raise ConfigError(
                f"DARKROOM_GRAPH_SIZES: {width}x{height} is no size of model {model.id}, expected multiples of "
                f"{multiple}"
            )
        lane_of(key_of(model, width, height)).capture(buckets, should_stop)


def try_decoding(
    models: Iterable[DiffusionModel], sizes_px: Sizes, decoder: Decoder, should_stop: Callable[[], bool]
) -> None:
    """Let the decoder meet every number of pictures that a call may have, at the sizes that ticks are captured for."""
    for model, width, height in _prepared(models, sizes_px):
        if not should_stop():
            decoder.try_out(model, width, height)


def request_of_nobody(model: DiffusionModel) -> GenerationRequest:
    """One picture of the model's own size, through everything that a request meets."""
    card = model.card
    return GenerationRequest(
        prompt="",
        model=model.id,
        width=card.width,
        height=card.height,
        num_inference_steps=2,
        guidance_scale=card.guidance_scale,
        seed=0,
        sampler=card.sampler,
        sigma_schedule=card.sigma_schedule,
    )


def _prepared(models: Iterable[DiffusionModel], sizes_px: Sizes) -> Iterator[tuple[DiffusionModel, int, int]]:
    """(model, width, height) of each model's own pictures, and of `sizes_px`."""
    for model in models:
        for width, height in dict.fromkeys(((model.card.width, model.card.height), *sizes_px)):
            yield model, width, height
