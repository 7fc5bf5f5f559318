"""The tick's last operation: guidance, network output → denoised, and each row's solver update."""

from darkroom_kernels.step.api import StepImplementation, StepUnavailable, step
from darkroom_kernels.step.columns import (
    A_D,
    A_D1,
    A_D2,
    A_NOISE,
    A_X,
    C_OUT,
    C_SKIP,
    CLAMP,
    INPUT_SCALE,
    NUM_COLUMNS,
)

__all__ = [
    "A_D",
    "A_D1",
    "A_D2",
    "A_NOISE",
    "A_X",
    "CLAMP",
    "C_OUT",
    "C_SKIP",
    "INPUT_SCALE",
    "NUM_COLUMNS",
    "StepImplementation",
    "StepUnavailable",
    "step",
]
