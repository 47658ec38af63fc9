"""Access memory: where addresses lead, and accesses that are checked against earlier ones.

Threads access through the generic proxy, operations through the async proxy or tensor memory.
"""
