"""Tensor operations of the denoising path. Imports nothing of `darkroom`."""
