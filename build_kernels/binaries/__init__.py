"""Readers of what compilers make: cubins."""
