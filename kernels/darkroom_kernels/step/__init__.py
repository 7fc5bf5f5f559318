"""What frames the network in a tick: the scaled input, then guidance, denoised and each row's solver update."""

from darkroom_kernels.backend import Implementation
from darkroom_kernels.step.api import scale_input, step_
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
    "Implementation",
    "scale_input",
    "step_",
]
