"""The faults: changes of the project's own PTX, by class, and the rungs that must reject each.

`MUTANTS` keeps the order of `table.txt`: the decode kernel's faults first, then those of the other
kernels, then the harmless changes.
"""

from __future__ import annotations

from . import (
    barriers,
    cases,
    harmless,
    layouts,
    options,
    ordering,
    prefill,
    prefill_pipelines,
    prefill_slices,
    selection,
)

MUTANTS = (
    *barriers.DECODE,
    *ordering.DECODE,
    *layouts.DECODE,
    *selection.DECODE,
    *barriers.PHYSICAL_IDS,
    *selection.PHYSICAL_IDS,
    *options.DECODE,
    *barriers.SM90,
    *ordering.SM90,
    *barriers.HASH,
    *ordering.HASH,
    *options.HASH,
    *layouts.HASH,
    *selection.HASH,
    ordering.TOPK_BARRIER,
    *selection.TOPK_TIE,
    selection.TOPK_STORE,
    ordering.TOPK_GRID,
    *options.TOPK_OPTIONS,
    *prefill.M_TILES,
    *prefill.ROUNDS,
    *prefill.TOKEN_TILES,
    *prefill_pipelines.PIPELINES,
    *prefill_pipelines.OPTIONS,
    *prefill_pipelines.SM100,
    *cases.DECODE,
    *cases.TOPK_FAULTS,
    *prefill_slices.SLICES,
    *prefill_slices.SECOND_LAUNCHES,
    *harmless.DECODE,
    *prefill_pipelines.HARMLESS,
)

__all__ = ["MUTANTS"]
