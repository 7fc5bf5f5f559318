"""From finished latents to image bytes, and from init images to latents, beside the tick loop.

One thread decodes latents in micro-batches and encodes init images, on a CUDA stream of its own; a small pool
compresses pixels. Neither ever runs on the tick thread, and neither can crowd it out: the pool's threads yield to all
others, and decoding waits when it is far ahead of them.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darkroom import metrics
from darkroom.diffusion.finish import Finisher
from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.vae import MAX_DECODE_PIXELS
from darkroom.engine.device import is_out_of_memory, to_host
from darkroom.engine.events import Preview
from darkroom.engine.previews import Previews
from darkroom.engine.pulse import Pulse
from darkroom.engine.row import ActiveJob, Interval, Row
from darkroom.engine.start import EncodedInputs, encode_inputs
from darkroom.engine.threads import use_cpu_threads
from darkroom.engine.tracebacks import release_frames
from darkroom.errors import JobError

# Lower priority, in the kernel's own unit: beside a busy thread, a quarter of its share.
ENCODE_NICENESS = 5
NEVER = Interval(0.0, 0.0)


@dataclass(frozen=True)
class Exposed:
    """A row's finished latents on their way to the VAE: `Decoder.submit`'s arguments."""

    row: Row
    latents: Tensor
    ready: torch.cuda.Event | None


@dataclass(frozen=True)
class Developed:
    """One finished image: its bytes, or why there are none, and when it was in the VAE and in compression."""

    row: Row
    outcome: bytes | Exception
    decode: Interval = NEVER
    image_encode: Interval = NEVER


@dataclass(frozen=True)
class Taken:
    """A job's pictures on their way to latents: the job and its model."""

    active: ActiveJob
    model: DiffusionModel


@dataclass(frozen=True)
class Encoded:
    """A job's encoded pictures, or why there are none, and when that was done."""

    active: ActiveJob
    outcome: EncodedInputs | Exception
    interval: Interval


@dataclass(frozen=True)
class Called:
    """Something else that the decoding thread is to do, and whoever waits for it."""

    work: Callable[[], None]
    done: Future[None]


class Decoder:
    """Decodes rows and reports each to `on_developed` on one of its threads; encodes what jobs begin with and reports
    that to `on_encoded`. `previews` makes previews on the same threads.

    `max_batch` is how many latents of one shape share a VAE call at most; large pictures share it with fewer. With
    `has_few_sizes` calls are of 1, 2, 4 or 8 latents and so on, the numbers that `try_out` has tried.
    """

    def __init__(
        self,
        on_developed: Callable[[Developed], None],
        on_encoded: Callable[[Encoded], None],
        on_preview: Callable[[Preview], None] | None = None,
        *,
        pulse: Pulse,
        max_batch: int,
        encode_threads: int,
        finish: Finisher,
        has_few_sizes: bool = False,
    ) -> None:
        self._on_developed = on_developed
        self._on_encoded = on_encoded
        self._pulse = pulse
        self._max_batch = max_batch
        self._finish = finish
        self._has_few_sizes = has_few_sizes
        self._waiting: queue.SimpleQueue[Exposed | Taken | Called | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(encode_threads, thread_name_prefix="image-encode", initializer=_yield_to_others)
        # Pictures that may wait for compression; latents are hundreds of times smaller.
        self._room = threading.Semaphore(max_batch + 2 * encode_threads)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.previews = Previews(on_preview, self._decode_now, self.call, self._pool.submit, pulse=pulse)
        self._thread = threading.Thread(target=self._run, name="vae-decode", daemon=True)
        self._thread.start()

    def submit(self, row: Row, latents: Tensor, ready: torch.cuda.Event | None) -> None:
        """Decode `latents` `[C, H, W]` fp32 of `row`, a copy that nobody else writes to, complete once `ready` is."""
        self._waiting.put(Exposed(row, latents, ready))

    def encode(self, active: ActiveJob, model: DiffusionModel) -> None:
        """Encode the pictures that a job brings. Not done any more once `close` was called."""
        self._waiting.put(Taken(active, model))

    def call(self, work: Callable[[], None]) -> Future[None]:
        """Do `work` on the thread that decodes, after the pictures that wait now."""
        done: Future[None] = Future()
        self._waiting.put(Called(work, done))
        return done

    def try_out(self, model: DiffusionModel, width: int, height: int) -> None:
        """Decode pictures of `width` × `height` for nobody, in every number that may share a call, and wait for it.

        On the thread that decodes, since libraries keep what they found out by thread. Raises what that meets.
        """
        self.call(lambda: self._try_out(model, width, height)).result()

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
            taken: list[Taken] = []
            called: list[Called] = []
            for exposed in arrived:
                if isinstance(exposed, Taken):
                    taken.append(exposed)
                elif isinstance(exposed, Called):
                    called.append(exposed)
                elif exposed is not None and not exposed.row.active.is_over:
                    groups.setdefault(exposed.row.key, []).append(exposed)
            for group in groups.values():
                request = group[0].row.active.job.request
                start = 0
                for size in self._sizes(len(group), request.width, request.height):
                    self._decode(group[start : start + size])
                    start += size
            for call in called:
                try:
                    call.work()
                    call.done.set_result(None)
                except Exception as error:
                    call.done.set_exception(error)
            # One at a time, so that finished pictures wait for one at most.
            for later in taken[1:]:
                self._waiting.put(later)
            if taken and is_open:
                self._encode_inputs(taken[0])

    def _sizes(self, count: int, width: int, height: int) -> list[int]:
        """How many of `count` pictures share each call."""
        most = max(1, min(self._max_batch, MAX_DECODE_PIXELS // (width * height)))
        sizes = []
        while count:
            size = min(count, most)
            sizes.append(1 << size.bit_length() - 1 if self._has_few_sizes else size)
            count -= sizes[-1]
        return sizes

    def _try_out(self, model: DiffusionModel, width: int, height: int) -> None:
        side = model.vae_scale_factor
        shape = model.latent_channels, height // side, width // side
        for size in sorted(set(self._sizes(2 * self._max_batch - 1, width, height))):
            drawn = torch.randn((size, *shape), generator=torch.Generator().manual_seed(size))
            self._decode_now(model, list(drawn.to(model.device)))

    def _decode_now(self, model: DiffusionModel, latents: list[Tensor]) -> list[NDArray[np.uint8] | None]:
        """Decode latents that are complete, on the thread that decodes."""
        return decode_latents(model, latents, [], self._stream(model.device))

    def _encode_inputs(self, taken: Taken) -> None:
        active, model = taken.active, taken.model
        if active.is_over:
            return
        started_s, request = time.monotonic(), active.job.request
        stream = self._stream(model.device)
        outcome: EncodedInputs | Exception
        active.is_encoding = True
        try:
            pixels = request.height * request.width
            with self._pulse.phase("encode", len(request.input_names) * pixels * pixels), _on(stream):
                outcome = encode_inputs(model, request, active.inputs)
        except Exception as error:
            release_frames(error)
            if is_out_of_memory(error):
                metrics.OUT_OF_MEMORY.labels("encode").inc()
            outcome = error
        self._on_encoded(Encoded(active, outcome, Interval(started_s, time.monotonic())))

    def _decode(self, group: list[Exposed]) -> None:
        started_s = time.monotonic()
        pixels = None
        try:
            model = group[0].row.model
            latents, ready = [exposed.latents for exposed in group], [exposed.ready for exposed in group]
            height, width = latents[0].shape[1:]
            with self._pulse.phase("decode", len(group) * (height * width) ** 2):
                pixels = decode_latents(model, latents, ready, self._stream(model.device))
        except Exception as error:
            release_frames(error)
            if is_out_of_memory(error):
                metrics.OUT_OF_MEMORY.labels("decode").inc()
            if len(group) == 1:
                self._on_developed(Developed(group[0].row, error))
                return
        if pixels is None:
            # One may be the cause, or all were too many: each by itself, with nothing left of the attempt.
            for exposed in group:
                self._decode([exposed])
            return
        decoded = Interval(started_s, time.monotonic())
        for exposed, image in zip(group, pixels, strict=True):
            self._room.acquire()
            self._pool.submit(self._compress, exposed.row, image, decoded)

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def _compress(self, row: Row, pixels: NDArray[np.uint8] | None, decoded: Interval) -> None:
        self._room.release()
        started_s = time.monotonic()
        outcome: bytes | Exception
        if pixels is None:
            metrics.NON_FINITE.labels("decode").inc()
            outcome = JobError("the picture came out as NaN or infinity", code="non_finite")
        else:
            try:
                outcome = self._finish(
                    pixels, row.active.job.request, row.index, model_hash=row.model.card.weights_hash
                )
            except Exception as error:
                outcome = error
        self._on_developed(Developed(row, outcome, decoded, Interval(started_s, time.monotonic())))


def _yield_to_others() -> None:
    """Linux gives each thread a priority of its own."""
    use_cpu_threads(1)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ENCODE_NICENESS)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@torch.inference_mode()
def decode_latents(
    model: DiffusionModel,
    latents: list[Tensor],
    ready: list[torch.cuda.Event | None],
    stream: torch.cuda.Stream | None,
) -> list[NDArray[np.uint8] | None]:
    """Decode `latents` `[C, H, W]` of one shape, complete once `ready` are, to `[H, W, 3]` uint8 each, or None where a
    picture holds NaN or infinity.

    On CUDA everything is queued on `stream`, pixels are made bytes there, and the calling thread sleeps until they have
    arrived. An autoencoder that overflows in fp16 is replaced, and decodes once more.
    """
    with _on(stream):
        for event in ready:
            if stream is not None and event is not None:
                stream.wait_event(event)
        together = torch.stack(latents).to(model.device)
        pixels, is_finite = _decode(model, together)
        overflowed = is_finite[0] & ~is_finite[1]
        if model.vae.dtype is torch.float16 and overflowed.any():
            metrics.NON_FINITE.labels("decode").inc(int(overflowed.sum()))
            model.upcast_vae()
            metrics.VAE_UPCASTS.inc()
            pixels, is_finite = _decode(model, together)
            metrics.NON_FINITE_RECOVERED.labels("decode").inc(int((overflowed & is_finite[1]).sum()))
    whole = is_finite.all(0).tolist()
    return [image if good else None for image, good in zip(pixels.numpy(), whole, strict=True)]


def _decode(model: DiffusionModel, latents: Tensor) -> tuple[Tensor, Tensor]:
    """In host memory: pictures `[B, H, W, 3]` uint8, and whether latents and pictures are finite, `[2, B]`."""
    pixels = model.vae.decode(latents)
    # The decoder clamps, which turns infinity into a colour: the latents tell.
    is_finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in (latents, pixels)])
    scaled = pixels.add(1).mul_(127.5).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    scaled, is_finite = to_host(scaled, is_finite)
    return scaled, is_finite
