"""The rungs of the ladder of evidence, one module each, in the order of the ladder."""

from __future__ import annotations

from . import emulated, faults, hardware, lint, protocol, structure
from .rung import Rung

RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        *(structure.RUNG, lint.RUNG, protocol.RUNG),
        *(emulated.RUNG, faults.RUNG, hardware.RUNG),
    )
}
