"""A residual and a bias added in place, in one pass. README.md has the traffic."""

from darkroom_kernels.residual.api import add_residual_

__all__ = ["add_residual_"]
