"""The self-check of a worker's start: small random inputs against the reference, on the device that will be used."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from darkroom_kernels.attention.api import forget_choices, triton_refusal
from darkroom_kernels.attention.launch import KERNEL, triton_attention
from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.backend import mark_failed, triton_problem

# Largest accepted error, as a share of the result's root mean square. Several times what rounding to each dtype costs,
# and far below what a wrong kernel gives.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1, torch.float32: 1e-4}
# Queries, keys, and whether rows have lengths and slots: odd sizes, so that masks are tried; a short text, and keys in
# several tiles. Then what a tick asks for, which is built without those masks: a text in its slot, and whole tiles.
CASES = ((150, 77, True, True), (200, 333, True, True), (256, 77, False, True), (256, 256, False, False))


def check_attention(device: torch.device, dtype: torch.dtype, head_dims: Iterable[int]) -> bool:
    """Compare the Triton kernels with the reference at these head sizes; True when all are right or none can run.

    A kernel that is wrong, or that does not compile or launch, is turned away from: `auto` takes another
    implementation, "triton" by name raises, and the error is logged.
    """
    if triton_problem(device) is not None:
        return True
    for head_dim in sorted(set(head_dims)):
        for num_queries, num_keys, has_lengths, has_slots in CASES:
            if triton_refusal(device, dtype, head_dim, num_queries, num_keys) is not None:
                continue
            try:
                error = _error(device, dtype, head_dim, num_queries, num_keys, has_lengths, has_slots)
            except Exception as broken:  # a compiler or launch error, whatever its class, means: do not use it
                problem = f"{type(broken).__name__}: {broken}"
            else:
                if error <= TOLERANCE[dtype]:
                    continue
                problem = f"off by {error:.3g} of the result, {TOLERANCE[dtype]:.3g} accepted"
            mark_failed(KERNEL, device, f"self-check at head size {head_dim} and {num_keys} keys in {dtype}: {problem}")
            forget_choices()
            return False
    return True


@torch.inference_mode()
def _error(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    num_queries: int,
    num_keys: int,
    has_lengths: bool,
    has_slots: bool,
) -> float:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, length, 3, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
        for length in (num_queries, num_keys, num_keys)
    )
    lengths = torch.tensor([num_keys, num_keys // 2], dtype=torch.int32, device=device) if has_lengths else None
    slots = torch.tensor([1, 0], device=device) if has_slots else None
    got = triton_attention(q, k, v, lengths, slots, head_dim**-0.5).float()
    if slots is not None:
        k, v = k[slots], v[slots]
    expected = reference_attention(q.float(), k.float(), v.float(), lengths)
    error = float((got - expected).abs().max() / expected.square().mean().sqrt())
    return error if error == error else float("inf")
