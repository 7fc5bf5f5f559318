"""Darkroom: a serving engine for latent diffusion."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("darkroom")
except PackageNotFoundError:  # running from a tree that was never installed
    __version__ = "0+unknown"
