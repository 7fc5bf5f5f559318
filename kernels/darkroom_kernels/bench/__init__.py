"""How the kernels are timed, and at which shapes: `darkroom bench kernels` and the benchmarks share it."""
