"""Ahead-of-time router kernels for DeepSeek-V4: loaded and launched with cuda-python alone."""
