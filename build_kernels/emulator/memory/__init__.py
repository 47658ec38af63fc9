"""Model memories byte by byte: global, shared, local, parameter and tensor memory.

Each byte has a state (poison until it is written) and records of the last accesses to it.
"""
