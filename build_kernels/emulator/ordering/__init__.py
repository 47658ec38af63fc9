"""Track happens-before: vector clocks, barriers, release and acquire, checked accesses.

A race is an access that no clock orders after an earlier one.
"""
