"""Samplers, schedulers and checkpoints as AUTOMATIC1111's clients spell them."""

from __future__ import annotations

from collections.abc import Iterable

from darkroom.api.body import describe
from darkroom.errors import RequestError, UnknownModel
from darkroom.infotext import SAMPLER_LABELS, SIGMA_SCHEDULE_LABELS, short_hash
from darkroom.jobs import ModelCard
from darkroom.queue import Cards
from darkroom.sampling import supported_sigma_schedules

SAMPLER_ALIASES: dict[str, tuple[str, ...]] = {
    "ddim": ("ddim",),
    "ddpm": ("ddpm",),
    "euler": ("k_euler",),
    "euler_a": ("k_euler_a", "k_euler_ancestral"),
    "heun": ("k_heun",),
    "dpmpp_2m": ("k_dpmpp_2m",),
    "dpmpp_2m_sde": ("k_dpmpp_2m_sde",),
    "unipc": ("unipc",),
    "lcm": ("k_lcm",),
}
# `uniform` is theirs for the spacing that a sampler has by itself, which here is the checkpoint's own.
SCHEDULE_ALIASES: dict[str, tuple[str, ...]] = {"simple": ("uniform",), "karras": (), "exponential": ()}
AUTOMATIC = "automatic"
# What `Automatic` is for these samplers there; for others it is the spacing that they have by themselves.
_AUTOMATIC_SCHEDULES = {"dpmpp_2m": "karras", "dpmpp_2m_sde": "exponential"}
# They take no heed of a scheduler there.
_OF_ONE_SCHEDULE = ("ddim", "ddpm", "lcm")

_SAMPLERS = {
    name.lower(): sampler
    for sampler, label in SAMPLER_LABELS.items()
    for name in (label, sampler, *SAMPLER_ALIASES[sampler])
}
_SCHEDULES = {
    name.lower(): schedule
    for schedule, label in SIGMA_SCHEDULE_LABELS.items()
    for name in (label, schedule, *SCHEDULE_ALIASES[schedule])
}


def sampling_of(card: ModelCard, sampler_name: str | None, scheduler: str | None) -> tuple[str, str]:
    """The sampler and the sigma schedule that are meant, those of `card` where nothing is said.

    Older clients write both in one name, as in "DPM++ 2M Karras". Raises `RequestError` (not_found) on names that are
    not among ours.
    """
    scheduler = (scheduler or AUTOMATIC).strip().lower()
    if not sampler_name:
        sampler = card.sampler
    else:
        name = sampler_name.strip().lower()
        if name not in _SAMPLERS:
            name, _, last = name.rpartition(" ")
            if last in (*_SCHEDULES, AUTOMATIC):
                scheduler = last
        if name not in _SAMPLERS:
            raise RequestError("Sampler not found", code="not_found")
        sampler = _SAMPLERS[name]
    if scheduler != AUTOMATIC and scheduler not in _SCHEDULES:
        raise RequestError("Scheduler not found", code="not_found")
    if sampler in _OF_ONE_SCHEDULE:
        return sampler, "simple"
    if scheduler != AUTOMATIC:
        return sampler, _SCHEDULES[scheduler]
    wanted = _AUTOMATIC_SCHEDULES.get(sampler, "simple") if sampler_name else card.sigma_schedule
    return sampler, wanted if wanted in card.sigma_schedules and wanted in _accepted(sampler) else "simple"


def _accepted(sampler: str) -> Iterable[str]:
    return supported_sigma_schedules(sampler)


def title_of(card: ModelCard) -> str:
    return f"{card.id} [{short_hash(card.weights_hash)}]"


def sha256_of(card: ModelCard) -> str:
    return card.weights_hash.rpartition(":")[2]


def default_card(cards: Cards) -> ModelCard | None:
    """The first model that is offered, for callers who never choose."""
    return next((cards.offered[name] for name in sorted(cards.offered)), None)


def find_card(cards: Cards, checkpoint: str) -> ModelCard:
    """The model that a title, an id, a file's name or a hash is of. Raises `UnknownModel`."""
    for card in (*cards.offered.values(), *cards.recent.values(), *cards.known.values()):
        names = (title_of(card), card.id, f"{card.id}.safetensors", short_hash(card.weights_hash), sha256_of(card))
        if checkpoint in names:
            return card
    titles = ", ".join(title_of(card) for card in cards.offered.values()) or "none at present"
    raise UnknownModel("sd_model_checkpoint", describe(checkpoint), f"one of {titles}")
