"""From a checked body and the models' cards to a `GenerationRequest` with nothing left open, and what it will cost."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any, get_args

import msgspec

from darkroom.api.body import Described, Missing, describe
from darkroom.api.intake import Pictures
from darkroom.api.problems import InvalidFields
from darkroom.api.schema import (
    DEFAULT_MASKED_STRENGTH,
    DEFAULT_STRENGTH,
    MAX_DEADLINE_S,
    MAX_GUIDANCE_SCALE,
    MAX_SEED,
    OUTPUT_FORMATS,
    RESIZE_MODES,
    GenerateRequest,
    PromptSyntax,
)
from darkroom.config import BUILTIN_MODEL, Settings
from darkroom.errors import InvalidRequest, NoModel, UnknownModel
from darkroom.jobs import INPUT_NAMES, GenerationRequest, ModelCard
from darkroom.queue import Cards
from darkroom.sampling import SAMPLERS, SIGMA_SCHEDULES, first_step, num_evaluations, supported_sigma_schedules

# A manifest takes 3 KiB and a chain of certificates.
_SIGNATURE_BYTES = 16 << 10


def accepted_values(settings: Settings) -> dict[str, str]:
    """What each field of a request accepts, in words for error messages."""
    prompt = f"{settings.max_prompt_chars} characters of valid Unicode, none of them NUL"
    return {
        "prompt": f"1 to {prompt}, not only blanks but beside init_image",
        "negative_prompt": f"0 to {prompt}",
        "model": "the id of one of the models of GET /models",
        "width": "a whole number of pixels, at least 1",
        "height": "a whole number of pixels, at least 1",
        "num_inference_steps": f"an integer from 1 to {settings.max_num_inference_steps}",
        "guidance_scale": f"a number from 0 to {MAX_GUIDANCE_SCALE:g}",
        "num_images_per_prompt": f"an integer from 1 to {settings.max_num_images}",
        "seed": f"an integer from 0 to {MAX_SEED} (less num_images_per_prompt - 1)",
        "sampler": f"one of {', '.join(SAMPLERS)}",
        "sigma_schedule": f"one of {', '.join(SIGMA_SCHEDULES)}",
        "clip_skip": "an integer from 0 up",
        "prompt_syntax": f"one of {', '.join(get_args(PromptSyntax))}",
        "output_format": f"one of {', '.join(OUTPUT_FORMATS)}",
        "init_image": "a picture in base64, or a data URL",
        "mask_image": "a picture in base64, or a data URL, beside init_image",
        "strength": "a number above 0, at most 1, beside init_image",
        "resize_mode": f"one of {', '.join(RESIZE_MODES)}",
        "output_quality": "an integer from 1 to 100",
        "priority": "one of low, normal, high",
        "deadline_s": f"a number of seconds above 0, at most {MAX_DEADLINE_S:g}",
        "mode": "one of wait, async",
        "on_disconnect": "one of cancel, continue",
        "wait_timeout_s": "a number of seconds from 0 up",
    }


def check_limits(
    body: GenerateRequest, settings: Settings, accepted: Mapping[str, str], *, has_init_image: bool = False
) -> None:
    """Refuse what no model could draw. `has_init_image` says that one came beside the body. Raises `InvalidFields`."""
    has_init_image = has_init_image or body.init_image is not None
    steps = body.num_inference_steps
    wrong = {
        "prompt": (not body.prompt.strip() and not has_init_image) or _is_bad_text(body.prompt, settings),
        "negative_prompt": _is_bad_text(body.negative_prompt, settings),
        "num_inference_steps": steps is not None and steps > settings.max_num_inference_steps,
        "num_images_per_prompt": body.num_images_per_prompt > settings.max_num_images,
        "seed": body.seed is not None and body.seed > MAX_SEED - body.num_images_per_prompt + 1,
        "sampler": body.sampler is not None and body.sampler not in SAMPLERS,
        "sigma_schedule": body.sigma_schedule is not None and body.sigma_schedule not in SIGMA_SCHEDULES,
        "mask_image": body.mask_image is not None and not has_init_image,
        "strength": body.strength is not None and not has_init_image,
    }
    if any(wrong.values()):
        raise InvalidFields(
            [InvalidRequest(name, _shown(body, name), accepted[name]) for name, is_wrong in wrong.items() if is_wrong]
        )


def _shown(body: GenerateRequest, name: str) -> object:
    """The value of a field as an error message may show it: never a picture."""
    return Described("a picture by itself") if name in INPUT_NAMES else describe(getattr(body, name))


def _is_bad_text(text: str, settings: Settings) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write but UTF-8 cannot
        return True
    return len(text) > settings.max_prompt_chars or "\0" in text


def choose_card(model: str | None, cards: Cards) -> ModelCard:
    """The card of the model asked for, or of the only one there is, or of several the built-in default.

    Raises `NoModel`, `UnknownModel`, or `InvalidRequest` when several could be meant.
    """
    if model is not None and model in cards.recent:
        return cards.recent[model]
    if model in cards.known:
        raise NoModel(f"no worker serves the model {model} at present", retry_after_s=5.0)
    if not cards.offered:
        raise NoModel("no worker serves a model", retry_after_s=2.0)
    if model is not None:
        raise UnknownModel("model", describe(model), f"one of {', '.join(sorted(cards.offered))}")
    if len(cards.offered) > 1:
        if BUILTIN_MODEL.name in cards.offered:
            return cards.offered[BUILTIN_MODEL.name]
        raise InvalidRequest("model", Missing(), f"one of {', '.join(sorted(cards.offered))}")
    return next(iter(cards.offered.values()))


def complete(
    body: GenerateRequest, card: ModelCard, output_format: str, pictures: Pictures | None = None
) -> GenerationRequest:
    """Fill in what was left out from the card, and from the `pictures` to begin with; `with_inputs` names these. Raises
    `InvalidFields` on what this model cannot do."""
    width, height = _size(body, card, pictures)
    num_inference_steps = body.num_inference_steps or card.num_inference_steps
    strength = _strength(body, pictures)
    sampler = body.sampler or card.sampler
    schedules = [name for name in supported_sigma_schedules(sampler) if name in card.sigma_schedules]
    sigma_schedule = body.sigma_schedule
    if sigma_schedule is None:
        # The model's own schedule may not suit the sampler that was asked for; `simple` suits all.
        sigma_schedule = card.sigma_schedule if card.sigma_schedule in schedules else "simple"

    problems = []
    for name, value, limit in (("width", width, card.max_width), ("height", height, card.max_height)):
        if value % card.size_multiple or not card.size_multiple <= value <= limit:
            accepted = f"a multiple of {card.size_multiple} from {card.size_multiple} to {limit}"
            problems.append(InvalidRequest(name, value, accepted))
    if sampler not in card.samplers:
        problems.append(InvalidRequest("sampler", sampler, f"one of {', '.join(card.samplers)} with model {card.id}"))
    elif sigma_schedule not in schedules:
        accepted = f"one of {', '.join(schedules)} with sampler {sampler}"
        problems.append(InvalidRequest("sigma_schedule", sigma_schedule, accepted))
    if body.clip_skip > card.max_clip_skip:
        accepted = f"an integer from 0 to {card.max_clip_skip} with model {card.id}"
        problems.append(InvalidRequest("clip_skip", describe(body.clip_skip), accepted))
    if card.needs_mask and (pictures is None or pictures.mask_image is None):
        name = "init_image" if pictures is None else "mask_image"
        problems.append(InvalidRequest(name, Missing(), f"init_image and mask_image, with model {card.id}"))
    try:
        first_step(num_inference_steps, strength)
    except InvalidRequest as error:
        problems.append(error)
    if problems:
        raise InvalidFields(problems)

    guidance_scale = card.guidance_scale if body.guidance_scale is None else body.guidance_scale
    return GenerationRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        model=card.id,
        width=width,
        height=height,
        num_inference_steps=num_inference_steps,
        guidance_scale=float(guidance_scale),
        num_images_per_prompt=body.num_images_per_prompt,
        seed=secrets.randbits(32) if body.seed is None else body.seed,
        sampler=sampler,
        sigma_schedule=sigma_schedule,
        clip_skip=body.clip_skip,
        prompt_syntax=body.prompt_syntax,
        output_format=output_format,
        strength=strength,
        output_quality=body.output_quality,
    )


def _size(body: GenerateRequest, card: ModelCard, pictures: Pictures | None) -> tuple[int, int]:
    """Width and height; those left out are the model's own or follow the init image, within what the model draws."""
    if pictures is None:
        return body.width or card.width, body.height or card.height
    width, height = pictures.size
    if body.width or body.height:
        scale = body.width / width if body.width else (body.height or height) / height
    else:
        scale = min(1.0, card.max_width / width, card.max_height / height)

    def drawn(length: int, limit: int) -> int:
        multiple = card.size_multiple
        return min(max(round(length * scale / multiple), 1) * multiple, limit // multiple * multiple)

    return body.width or drawn(width, card.max_width), body.height or drawn(height, card.max_height)


def _strength(body: GenerateRequest, pictures: Pictures | None) -> float:
    if pictures is None:
        return 1.0
    if body.strength is not None:
        return body.strength
    return DEFAULT_STRENGTH if pictures.mask_image is None else DEFAULT_MASKED_STRENGTH


def with_inputs(request: GenerationRequest, inputs: Mapping[str, bytes]) -> GenerationRequest:
    """The request with the pictures that will travel beside it, by name."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in inputs.items()}
    return msgspec.structs.replace(request, **hashes)


def cost_of(request: GenerationRequest, card: ModelCard) -> float:
    """Model rows × UNet evaluations × latent pixels. To encode a picture counts as one evaluation of one row."""
    evaluations = num_evaluations(request.sampler, request.num_inference_steps, request.strength)
    rows = request.num_model_rows * evaluations + len(request.input_names)
    return float(rows * _latent_pixels(request, card))


def checkpoint_bytes_of(request: GenerationRequest, card: ModelCard) -> int:
    """The most that checkpoints of a request take: fp32 latents and the two denoised before them, for each image."""
    return request.num_images_per_prompt * 3 * 4 * card.latent_channels * _latent_pixels(request, card)


def result_bytes_of(request: GenerationRequest, settings: Settings) -> int:
    """The most that the pictures of a request take: their pixels as they are, and a signature where workers sign."""
    overhead = _SIGNATURE_BYTES if settings.c2pa_cert is not None else 0
    return request.num_images_per_prompt * (request.width * request.height * 3 + overhead)


def _latent_pixels(request: GenerationRequest, card: ModelCard) -> int:
    return (request.width // card.vae_scale_factor) * (request.height // card.vae_scale_factor)


def check_cost(cost: float, settings: Settings) -> None:
    """Raise `InvalidRequest` when one request would keep a worker for too long."""
    if cost > settings.max_job_cost:
        raise InvalidRequest(
            "cost",
            int(cost),
            f"at most {settings.max_job_cost:.0f} model rows × evaluations × latent pixels; "
            "ask for fewer images, fewer steps or a smaller size",
        )


def fingerprint(
    body: GenerateRequest, output_format: str, pictures: Pictures | None = None, *, tenant: str = "default"
) -> str:
    """A hash of what was asked for and for whom; two bodies under one Idempotency-Key must agree in it.

    How the answer is delivered (`mode`, `wait_timeout_s`, `on_disconnect`) is left out: a retry may choose another way.
    """
    # Pictures are told by what they hold, however they were written.
    left_out = {"mode", "wait_timeout_s", "on_disconnect", *INPUT_NAMES}
    asked: dict[str, Any] = body.model_dump(exclude_unset=True, exclude=left_out)
    asked["output_format"] = output_format
    if tenant != "default":
        asked["tenant"] = tenant
    if pictures is not None:
        asked["pictures"] = pictures.digest
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
