"""From finished latents to image bytes, beside the tick loop.

One thread decodes latents in micro-batches; a small pool compresses pixels. Neither ever runs on the tick thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darkroom import __version__
from darkroom.diffusion.images import encode_image
from darkroom.engine.row import Row
from darkroom.engine.threads import use_cpu_threads
from darkroom.errors import JobError

MAX_DECODE_PIXELS = 1 << 21


@dataclass(frozen=True)
class Exposed:
    """A row's finished latents on their way to the VAE: `Decoder.submit`'s arguments."""

    row: Row
    latents: Tensor
    ready: torch.cuda.Event | None


@dataclass(frozen=True)
class Developed:
    """One finished image: its bytes, or why there are none, and the seconds that the VAE and the compression took."""

    row: Row
    outcome: bytes | Exception
    decode_s: float = 0.0
    image_encode_s: float = 0.0


class Decoder:
    """Decodes rows and reports each to `on_developed` on one of its threads.

    `max_batch` is how many latents of one shape share a VAE call at most; large pictures share it with fewer.
    """

    def __init__(self, on_developed: Callable[[Developed], None], *, max_batch: int, encode_threads: int) -> None:
        self._on_developed = on_developed
        self._max_batch = max_batch
        self._waiting: queue.SimpleQueue[Exposed | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(encode_threads, thread_name_prefix="image-encode")
        self._thread = threading.Thread(target=self._run, name="vae-decode", daemon=True)
        self._thread.start()

    def submit(self, row: Row, latents: Tensor, ready: torch.cuda.Event | None) -> None:
        """Decode `latents` `[C, H, W]` fp32 of `row`, a copy that nobody else writes to, complete once `ready` is."""
        self._waiting.put(Exposed(row, latents, ready))

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        self._waiting.put(None)
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        # One CPU thread: the others belong to the ticks.
        use_cpu_threads(1)
        is_open = True
        while is_open:
            arrived = [self._waiting.get()]
            while len(arrived) < 64:
                try:
                    arrived.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            is_open = None not in arrived
            groups: dict[object, list[Exposed]] = {}
            for exposed in arrived:
                if exposed is not None and not exposed.row.active.is_over:
                    groups.setdefault(exposed.row.key, []).append(exposed)
            for group in groups.values():
                request = group[0].row.active.job.request
                size = max(1, min(self._max_batch, MAX_DECODE_PIXELS // (request.width * request.height)))
                for start in range(0, len(group), size):
                    self._decode(group[start : start + size])

    def _decode(self, group: list[Exposed]) -> None:
        started_s = time.monotonic()
        try:
            pixels = decode_latents(group)
        except Exception as error:
            if len(group) == 1:
                self._on_developed(Developed(group[0].row, error))
                return
            # One may be the cause, or all were too many: each by itself.
            for exposed in group:
                self._decode([exposed])
            return
        decode_s = time.monotonic() - started_s
        for exposed, image in zip(group, pixels, strict=True):
            self._pool.submit(self._encode, exposed.row, image, decode_s)

    def _encode(self, row: Row, pixels: NDArray[np.uint8] | None, decode_s: float) -> None:
        started_s = time.monotonic()
        outcome: bytes | Exception
        if pixels is None:
            outcome = JobError("the picture came out as NaN or infinity", code="non_finite")
        else:
            try:
                outcome = encode_image(
                    pixels,
                    row.active.job.request,
                    row.index,
                    model_hash=row.model.card.weights_hash,
                    version=__version__,
                )
            except Exception as error:
                outcome = error
        self._on_developed(Developed(row, outcome, decode_s, time.monotonic() - started_s))


@torch.inference_mode()
def decode_latents(group: list[Exposed]) -> list[NDArray[np.uint8] | None]:
    """Decode rows of one shape to `[H, W, 3]` uint8 each, or None where a picture holds NaN or infinity."""
    for exposed in group:
        if exposed.ready is not None:
            exposed.ready.synchronize()
    latents = torch.stack([exposed.latents for exposed in group])
    pixels = group[0].row.model.vae.decode(latents)
    # The decoder clamps, which turns infinity into a colour: the latents tell.
    is_finite = (latents.isfinite().flatten(1).all(1) & pixels.isfinite().flatten(1).all(1)).tolist()
    scaled = pixels.float().add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [image if finite else None for image, finite in zip(scaled, is_finite, strict=True)]
