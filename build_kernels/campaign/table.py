"""Every row of the fault campaign."""

from __future__ import annotations

from .fault import Fault
from .residue import NAN, RESIDUE
from .tears import TEARS
from .tested import TESTED

FAULTS: tuple[Fault, ...] = (*TEARS, *RESIDUE, NAN, *TESTED)
BY_NAME = {fault.name: fault for fault in FAULTS}
