"""Model memories byte by byte: global, shared, local, parameter and tensor memory.

Each byte knows whether it was ever written and which accesses touched it last.
"""
