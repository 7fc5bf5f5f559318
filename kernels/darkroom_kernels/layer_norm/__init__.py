"""Layer normalisation with the addition before it fused in. The maths is in README.md."""

from darkroom_kernels.backend import Implementation
from darkroom_kernels.layer_norm.api import layer_norm

__all__ = ["Implementation", "layer_norm"]
