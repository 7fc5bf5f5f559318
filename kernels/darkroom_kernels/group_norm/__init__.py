"""Group normalisation with the additions around it fused in. The maths is in README.md."""

from darkroom_kernels.backend import Implementation
from darkroom_kernels.group_norm.api import group_norm

__all__ = ["Implementation", "group_norm"]
