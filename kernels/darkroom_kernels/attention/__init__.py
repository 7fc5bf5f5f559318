"""Scaled dot-product attention behind one door. The maths is in README.md."""

from darkroom_kernels.attention.api import (
    Implementation,
    attention,
    check_available,
    choose,
    head_refusal,
    takes_key_lengths,
)

__all__ = ["Implementation", "attention", "check_available", "choose", "head_refusal", "takes_key_lengths"]
