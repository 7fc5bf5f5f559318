"""A residual and a bias added in place, in one pass. README.md has the traffic."""

from darkroom_kernels.backend import Implementation
from darkroom_kernels.residual.api import add_residual_

__all__ = ["Implementation", "add_residual_"]
