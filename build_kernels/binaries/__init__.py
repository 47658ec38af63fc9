"""Readers of compiled kernels: cubins, their disassembly, PTX."""
