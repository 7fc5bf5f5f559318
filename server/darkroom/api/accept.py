"""Choose the form of the reply from `Accept`: JSON, or the bytes of the first image."""

from __future__ import annotations

from darkroom.api.schema import OUTPUT_FORMATS
from darkroom.errors import RequestError

_JSON = "application/json"


def negotiate(accept: str | None, output_format: str | None) -> tuple[bool, str]:
    """Return (reply with image bytes, output format).

    The highest q wins, then the more specific range, then the one named first; JSON is preferred where nothing is said.
    `output_format`, when given, must be among what `Accept` allows. Raises `RequestError` (code `not_acceptable`).
    """
    ranges = _parse(accept or "*/*")
    formats = [output_format] if output_format is not None else list(OUTPUT_FORMATS)
    offers = [_JSON, *(f"image/{name}" for name in formats)]
    ranked = []
    for preference, offer in enumerate(offers):
        quality, specificity, position = _match(ranges, offer)
        if quality > 0:
            ranked.append((-quality, -specificity, position, preference, offer))
    if not ranked:
        raise RequestError(
            f"the reply can be {_JSON} or {' or '.join(offers[1:])}, which Accept rules out", code="not_acceptable"
        )
    chosen = min(ranked)[-1]
    if chosen == _JSON:
        return False, output_format or OUTPUT_FORMATS[0]
    return True, chosen.removeprefix("image/")


def _parse(accept: str) -> list[tuple[str, float]]:
    ranges = []
    for part in accept.split(",")[:64]:
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                try:
                    quality = min(max(float(value), 0.0), 1.0)
                except ValueError:
                    quality = 0.0
        if name:
            ranges.append((name, quality))
    return ranges


def _match(ranges: list[tuple[str, float]], offer: str) -> tuple[float, int, int]:
    """(quality, specificity, position) that the most specific matching range gives to `offer`."""
    best = (0.0, -1, len(ranges))
    kind = offer.partition("/")[0]
    for position, (name, quality) in enumerate(ranges):
        specificity = {offer: 2, f"{kind}/*": 1, "*/*": 0}.get(name, -1)
        if specificity > best[1]:
            best = (quality, specificity, position)
    return best
