"""The gated feed-forward of a transformer block. The maths is in README.md."""

from darkroom_kernels.geglu.api import Implementation, geglu

__all__ = ["Implementation", "geglu"]
