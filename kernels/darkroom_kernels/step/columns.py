"""Columns of a coefficient line: one line is one UNet evaluation of one row."""

INPUT_SCALE = 0
"""The network sees `INPUT_SCALE · x`. Applied by the caller, before the network."""
C_SKIP = 1
C_OUT = 2
CLAMP = 3
"""The denoised latents are clamped to ±CLAMP; 0 means no clamp."""
A_X = 4
A_D = 5
A_D1 = 6
A_D2 = 7
A_NOISE = 8
NUM_COLUMNS = 9
