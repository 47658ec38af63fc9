"""Compute with PTX's floating-point types and rounding modes on NumPy arrays."""
