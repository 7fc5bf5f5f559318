"""Tensor operations of the denoising path. Imports nothing of `darkroom`."""

from darkroom_kernels.attention import Implementation, attention, check_available
from darkroom_kernels.geglu import geglu
from darkroom_kernels.group_norm import group_norm

__all__ = ["Implementation", "attention", "check_available", "geglu", "group_norm"]
