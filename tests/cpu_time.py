"""CPU time in units of an exponentiation that is timed beside it: a busy core slows both."""

from __future__ import annotations

import time
from collections.abc import Callable

PRIME = 2**255 - 19
# pow(base, PRIME - 2, PRIME) on a core that no other process shared.
UNIT_MS = 0.12


def best_ms(work: Callable[[], object], rounds: int) -> float:
    """Return the best CPU time of `work` in ms, scaled to a core where the unit takes UNIT_MS."""
    times, units = [], []
    for base in range(2, 2 + rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
        units.append(unit(base))
    return scaled_ms(min(times), min(units))


def unit(base: int) -> float:
    """Return the CPU time of one exponentiation in seconds."""
    start = time.process_time()
    for _ in range(10):
        pow(base, PRIME - 2, PRIME)
    return (time.process_time() - start) / 10


def scaled_ms(seconds: float, unit_seconds: float) -> float:
    """Return ms on a core where the unit, which took `unit_seconds` here, takes UNIT_MS."""
    return seconds / unit_seconds * UNIT_MS
