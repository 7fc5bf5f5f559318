"""One image's trajectory as bytes, so that another worker goes on where this one was.

A trajectory is its latents, the number of evaluations done, and as much of the solver's memory as the next one reads.
Everything else follows from the job: the table from the sampler, the noise still to come from the seed.

Layout, little-endian: `HEADER`, then fp32 values: latents `[C, H, W]`, denoised latents `[history, C, H, W]`.
A reader that finds anything it does not know starts the image anew; nothing here is ever a reason to fail.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch
from darkroom_kernels.step import A_D1, A_D2
from torch import Tensor

from darkroom.diffusion.samplers import SamplerTable

MAGIC = b"DRCP"
VERSION = 1
# magic, version, history, fingerprint, evaluations done, C, H, W
HEADER = struct.Struct("<4sHH16sIIII")
# The denoised latents of this many evaluations are all that any sampler looks back on.
MAX_HISTORY = 2


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """`num_done` evaluations of image `index` are done, and this is what they left.

    `latents` `[C, H, W]` and `previous` `[2, C, H, W]`, the last denoised first, fp32 on the host. `fingerprint` says
    which trajectory of which weights it is; `history` how many of `previous` will be read again.
    """

    index: int
    num_done: int
    latents: Tensor
    previous: Tensor
    history: int
    fingerprint: bytes

    def pack(self) -> bytes:
        head = HEADER.pack(MAGIC, VERSION, self.history, self.fingerprint, self.num_done, *map(int, self.latents.shape))
        return b"".join((head, self.latents.numpy().tobytes(), self.previous[: self.history].numpy().tobytes()))


def unpack(data: bytes, index: int, fingerprint: bytes, shape: tuple[int, int, int]) -> Checkpoint | None:
    """A packed checkpoint of image `index`, or None if it is of another version, trajectory or shape, or damaged."""
    if len(data) < HEADER.size:
        return None
    magic, version, history, of, num_done, *stored_shape = HEADER.unpack_from(data)
    if (magic, version, of, tuple(stored_shape)) != (MAGIC, VERSION, fingerprint, shape) or history > MAX_HISTORY:
        return None
    num_values = (1 + history) * shape[0] * shape[1] * shape[2]
    if len(data) != HEADER.size + 4 * num_values:
        return None
    values = torch.frombuffer(bytearray(data), dtype=torch.float32, count=num_values, offset=HEADER.size)
    latents, *denoised = values.view(1 + history, *shape)
    previous = torch.zeros((MAX_HISTORY, *shape))
    for past, stored in zip(previous, denoised, strict=False):
        past.copy_(stored)
    return Checkpoint(index, num_done, latents.clone(), previous, history, fingerprint)


def fingerprint_of(weights_hash: str, table: SamplerTable, seed: int, *inputs: str) -> bytes:
    """What two workers must agree on for one to go on where the other was: weights, table, seed and the hashes of the
    pictures that it began from. 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = (table.coefficients.numpy().tobytes(), table.timesteps.numpy().tobytes())
    for part in (weights_hash.encode(), *tensors, str(seed).encode(), *map(str.encode, inputs)):
        digest.update(part)
    return digest.digest()


def history_at(table: SamplerTable, num_done: int) -> int:
    """How many denoised latents evaluations from `num_done` on still read that earlier ones made."""
    lines = table.coefficients[num_done : num_done + MAX_HISTORY]
    # The line at hand reads the last one and the one before; the line after it reads one of them as its second last.
    reads_last, reads_second = lines[:, A_D1] != 0, lines[:, A_D2] != 0
    if len(lines) and bool(reads_second[0]):
        return 2
    return int((len(lines) and bool(reads_last[0])) or (len(lines) > 1 and bool(reads_second[1])))
