"""Tensor operations of the denoising path. Imports nothing of `darkroom`."""

from darkroom_kernels.attention import Implementation, attention, check_available, head_refusal
from darkroom_kernels.check import check_kernels
from darkroom_kernels.geglu import geglu
from darkroom_kernels.group_norm import group_norm
from darkroom_kernels.layer_norm import layer_norm
from darkroom_kernels.residual import add_residual_

__all__ = [
    "Implementation",
    "add_residual_",
    "attention",
    "check_available",
    "check_kernels",
    "geglu",
    "group_norm",
    "head_refusal",
    "layer_norm",
]
