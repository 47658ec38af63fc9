"""Access memory: resolve addresses, and check accesses against earlier ones.

Threads access through the generic proxy, operations through the async proxy or tensor memory.
"""
