"""Faults of order: fences, waits, barriers and releases that are missing."""

from __future__ import annotations

from functools import partial

from build_kernels.mutants.mutant import Edit

from .edits import deleted
from .kernels import (
    BOTH,
    EMPTY_SLICES,
    ONE_BLOCK,
    TWO_TILES,
    WRAPS,
    WRAPS_BOTH,
    given,
    hash_layer,
    of_kind,
    sm90,
    sm100,
    topk,
)

_CLUSTER = "missing cluster barrier"
_GRID = "missing grid dependency"
_INIT_FENCE = r"fence\.mbarrier_init\.release\.cluster;"
_AFTER_SYNC = r"tcgen05\.fence::after_thread_sync;"
_WAIT_LD = r"tcgen05\.wait::ld\.sync\.aligned;"
_GRID_WAIT = r"griddepcontrol\.wait;"

# Of the waits in the text's order the first is the producer's, the second the row-flags warp's.
_EARLY = deleted(_GRID_WAIT, 1)


def _of(what: str) -> str:
    """Return the complaint about a use, such as "hidden_states loaded" or "ticket drawn"."""
    tensor = what.split()[0].replace("ticket", "workspace")
    return f"{tensor} belongs to the grid before"


_WAIT_GROUP = r"(wgmma\.wait_group\.sync\.aligned \t)0;"

_NO_WARP_BARRIER = deleted(r"bar\.warp\.sync[^;]*;")
_NO_WAIT_GROUP = deleted(_WAIT_GROUP)
_ONE_LATE = Edit(pattern=_WAIT_GROUP, replacement=r"\g<1>1;")
_NO_CLUSTER_BARRIER = deleted(r"barrier\.cluster\.(arrive\.relaxed|wait);")
_NO_CLUSTER_WAIT = deleted(r"barrier\.cluster\.wait;", 0)

DECODE = (
    sm100("no fence after mbarrier.init", "missing proxy fence", deleted(_INIT_FENCE)),
    sm100("no tcgen05.fence::after_thread_sync", "missing tcgen05 fence", deleted(_AFTER_SYNC)),
    sm100("no tcgen05.wait::ld", "missing wait::ld", deleted(_WAIT_LD)),
    # The lint rung allows a diagnostic of the kernel because both rungs reject this mutant.
    *of_kind(
        *(sm100, "early dealloc"),
        ("dealloc before all warps have read", deleted(r"bar\.sync \t1, 128;"), BOTH),
    ),
    sm100("no dealloc", "missing dealloc", deleted(r"tcgen05\.dealloc[^;]*;")),
    sm100("no cluster barrier", _CLUSTER, _NO_CLUSTER_BARRIER, rejected_by=BOTH),
    # SentryWard takes the relaxed cluster barrier for one that orders memory.
    sm100("no CTA barrier after setup", "missing CTA barrier", deleted(r"bar\.sync \t0;")),
    # SentryWard takes the other warps' wait for one of all warps.
    *of_kind(
        *(sm100, _CLUSTER),
        ("epilogue does not wait for the cluster", _NO_CLUSTER_WAIT, "barrier-uninitialised"),
        # The epilogue of a CTA with K blocks comes after loads, which wait for the cluster.
        case=EMPTY_SLICES,
    ),
    *(
        sm100(f"{what} before the grid dependency", _GRID, edit, case=case, complaint=_of(what))
        for what, edit, case in (
            ("hidden_states loaded", deleted(_GRID_WAIT, 0), ONE_BLOCK),
            ("ticket drawn", _EARLY, TWO_TILES),
            ("image_mask read", _EARLY, given("images")),
            ("padding_mask read", _EARLY, given("padding")),
            ("num_valid_tokens read", _EARLY, given("count")),
            ("forced_ids read", _EARLY, given("forced")),
        )
    ),
)

SM90 = of_kind(
    *(partial(sm90, case=WRAPS_BOTH), "missing wgmma wait"),
    ("sm_90: no wgmma.wait_group", _NO_WAIT_GROUP, "race"),
    ("sm_90: ring freed while its last wgmmas still run", _ONE_LATE, "race"),
) + of_kind(
    *(partial(sm90, case=WRAPS_BOTH), "missing wgmma fence"),
    ("sm_90: no wgmma.fence", deleted(r"wgmma\.fence\.sync\.aligned;"), "missing-wgmma-fence"),
)

HASH = (
    hash_layer(
        *("hash: no barrier between storing W_gate and the arrival", "missing warp barrier"),
        _NO_WARP_BARRIER,
        complaint="race",
    ),
    hash_layer(
        *("hash: no fence between storing W_gate and multiplying", "missing proxy fence"),
        deleted(r"fence\.proxy\.async\.shared::cta;"),
        case=WRAPS,
        complaint="missing-proxy-fence",
    ),
    *(
        hash_layer(
            *(f"hash: {what} before the grid dependency", _GRID, deleted(_GRID_WAIT, nth)),
            case=given(option),
            complaint=_of(what),
        )
        for nth, what, option in (
            (0, "hidden_states loaded", "padding"),
            # The first of the loading warps' and that of the epilogue.
            (1, "forced_ids read", "forced"),
            (3, "forced_ids weighed", "forced"),
            (4, "padding_mask read", "padding"),
        )
    ),
)

TOPK_BARRIER = topk(
    *("top-k: no barrier between writing keys and reading them", "missing warp barrier"),
    _NO_WARP_BARRIER,
    rejected_by=BOTH,
    complaint="race",
)
TOPK_GRID = topk("top-k: logits read before the grid dependency", _GRID, deleted(_GRID_WAIT))
