"""Compiles the router's kernels ahead of time, on a machine with no GPU and no CUDA toolkit."""
