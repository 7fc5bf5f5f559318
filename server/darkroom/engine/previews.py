"""What a running row looks like: previews, made beside the tick loop on the threads that finish pictures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from darkroom import metrics
from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.previews import PreviewMap, encode_preview, fit_previews
from darkroom.engine.events import Preview
from darkroom.engine.pulse import Pulse
from darkroom.engine.row import Row
from darkroom.engine.tracebacks import release_frames

# The part of its time that the decoding thread may give to previews.
DECODE_SHARE = 0.02
# What a linear preview costs in all, its way to Redis included, over the CPU time that it takes to make.
WHOLE_COST = 3.0

log = structlog.get_logger("darkroom.engine")


@dataclass(frozen=True)
class Glimpse:
    """A running row's denoised latents `[C, H, W]` fp32 on the host, after `step` evaluations, to be shown as the job
    asks for."""

    row: Row
    latents: Tensor
    step: int


class Previews:
    """Makes previews and reports each to `on_preview`.

    `decode` decodes latents `[C, H, W]` to pixels, or None where they are not finite, on the thread that `call` runs
    something on; `submit` runs something on one of several threads for short work.
    """

    def __init__(
        self,
        on_preview: Callable[[Preview], None] | None,
        decode: Callable[[DiffusionModel, list[Tensor]], Sequence[NDArray[np.uint8] | None]],
        call: Callable[[Callable[[], None]], Future[None]],
        submit: Callable[..., Future[Any]],
        *,
        pulse: Pulse,
    ) -> None:
        self._on_preview = on_preview
        self._decode, self._call, self._submit = decode, call, submit
        self._pulse = pulse
        self._maps: dict[str, PreviewMap | None] = {}
        # The latest of each row that is to be shown, by row.
        self._glimpses: dict[int, Glimpse] = {}
        self._lock = threading.Lock()
        self._decode_after_s = 0.0
        # CPU seconds that a linear preview costs, lately.
        self.cost_s = 0.0

    def show(self, row: Row, latents: Tensor, step: int) -> None:
        """Make the preview that the row's job asks for of `latents`, its denoised ones after `step` evaluations,
        `[C, H, W]` fp32 on the host. A later call for the same row takes the place of one that is not begun yet."""
        with self._lock:
            is_waiting = row.id in self._glimpses
            self._glimpses[row.id] = Glimpse(row, latents, step)
        if is_waiting:
            return
        if row.active.previews == "vae" or row.model.id not in self._maps:
            self._call(lambda: self._show(row.id))
        else:
            self._submit(self._draw, row.id)

    def fit(self, model: DiffusionModel) -> None:
        """Fit the map of a model's previews, and wait for it."""
        self._call(lambda: self._fit(model)).result()

    def _fit(self, model: DiffusionModel) -> None:
        """Fit the map of a model's previews, unless that was done; it is None where it cannot be had."""
        if model.id in self._maps:
            return
        fitted: PreviewMap | None = None
        try:
            with self._pulse.phase("previews", 1.0), torch.inference_mode():
                fitted = fit_previews(
                    model.latent_channels, model.vae_scale_factor, lambda fields: self._decode(model, list(fields))
                )
        except Exception as error:
            release_frames(error)
            log.warning("no_linear_previews", model=model.id, exc_info=error)
        self._maps[model.id] = fitted

    def _show(self, row_id: int) -> None:
        """Make a preview that takes the autoencoder, or a map that is yet to be fitted."""
        glimpse = self._glimpses[row_id]
        row, latents = glimpse.row, glimpse.latents
        if row.active.previews != "vae":
            self._fit(row.model)
            self._submit(self._draw, row_id)
            return
        with self._lock:
            del self._glimpses[row_id]
        started_s = time.monotonic()
        if row.active.is_over or started_s < self._decode_after_s:
            return
        try:
            with self._pulse.phase("decode", float((latents.shape[1] * latents.shape[2]) ** 2)):
                (pixels,) = self._decode(row.model, [latents])
        except Exception as error:
            release_frames(error)
            log.warning("no_preview", job_id=row.active.job.id, exc_info=error)
            return
        self._decode_after_s = started_s + (time.monotonic() - started_s) / DECODE_SHARE
        if pixels is not None:
            self._submit(self._send, glimpse, pixels, "vae")

    def _draw(self, row_id: int) -> None:
        with self._lock:
            glimpse = self._glimpses.pop(row_id)
        preview_map = self._maps[glimpse.row.model.id]
        active = glimpse.row.active
        if preview_map is None or active.is_over or active.previews == "off":
            return
        began_s = time.thread_time()
        with torch.inference_mode():
            pixels = preview_map.draw(glimpse.latents)
        self._send(glimpse, pixels, "linear")
        cost_s = WHOLE_COST * (time.thread_time() - began_s)
        self.cost_s += 0.1 * (cost_s - self.cost_s) if self.cost_s else cost_s

    def _send(self, glimpse: Glimpse, pixels: NDArray[np.uint8], kind: str) -> None:
        row = glimpse.row
        image = encode_preview(pixels)
        metrics.PREVIEWS.labels(kind).inc()
        preview = Preview(row.active.job, row.index, glimpse.step, row.table.num_evaluations, image)
        with self._lock:
            # Several threads draw, and the older one of two may be ready later.
            if self._on_preview is not None and row.previewed_step < glimpse.step and not row.active.is_over:
                row.previewed_step = glimpse.step
                self._on_preview(preview)
