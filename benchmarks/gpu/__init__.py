"""The GPU benchmarks: kernels, whole models, step batching. README.md of the folder above says how to run them."""
