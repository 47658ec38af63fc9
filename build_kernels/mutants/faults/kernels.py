"""The kernels that the mutants are made from, the cases that they run on, and their rungs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from build_kernels.evidence.cases import Case
from build_kernels.mutants.mutant import Edit, Mutant

BOTH = ("emulated", "protocol")
EMULATED = ("emulated",)
PROTOCOL = ("protocol",)
# SentryWard needs the row flags: it is undecided about a decode kernel that never reads them.
BEFORE_ROW_FLAGS = EMULATED

# A ring has 8 blocks of K, in 1, 2 or 8 stages (router_hash, n8, n64). With 9 blocks per CTA a
# stage is used again, and the last chunk is ragged if a chunk has more than one block.
BLOCKS_OF_A_WRAP = 9
# With so many, both stages of n8 are used again.
BLOCKS_OF_BOTH_STAGES = 13
BLOCK_K = 64 * 16

ONE_BLOCK = Case(num_tokens=7, num_experts=60, top_k=6, k=BLOCK_K)
# Of 16 slices of K all but the last are empty.
EMPTY_SLICES = replace(ONE_BLOCK, k=64)
WRAPS = replace(ONE_BLOCK, k=BLOCK_K * BLOCKS_OF_A_WRAP)
WRAPS_BOTH = replace(ONE_BLOCK, k=BLOCK_K * BLOCKS_OF_BOTH_STAGES)
TWO_TILES = replace(ONE_BLOCK, num_experts=100)
TIES = replace(ONE_BLOCK, kind="ties")
CROWDED = replace(ONE_BLOCK, kind="crowded")
# A lane merges six candidates.
THREE_TILES = replace(CROWDED, num_tokens=3, num_experts=132, top_k=8)
TOPK = Case(num_tokens=7, num_experts=132, top_k=6)

WRONG_IDS = "ids are wrong"
WRONG_WEIGHT = "a weight is off"


def given(*options: str) -> Case:
    """Return the case of one block with these options."""
    return replace(ONE_BLOCK, options=options)


def mutant(
    artifact: str, name: str, kind: str, *edits: Edit, case: Case = ONE_BLOCK, **more: Any
) -> Mutant:
    """Return a mutant of an artifact, for the emulated rung to reject if `more` names no other."""
    more.setdefault("rejected_by", EMULATED)
    return Mutant(name=name, kind=kind, artifact=artifact, edits=edits, case=case, **more)


sm100 = partial(mutant, "router_decode_kmajor_n8.sm_100a")
emajor = partial(mutant, "router_decode_emajor_n64.sm_100a")
sm90 = partial(mutant, "router_decode_kmajor_n8.sm_90a")
hash_layer = partial(mutant, "router_hash.sm_100a")
topk = partial(mutant, "router_topk.sm_100a", case=TOPK)

_FIELDS = {tuple: "rejected_by", Case: "case", str: "complaint"}


def of_kind(
    make: Callable[..., Mutant], kind: str, *rows: tuple[Any, ...], **common: Any
) -> tuple[Mutant, ...]:
    """Return the mutants of one class.

    rows: name, edit, and the differences from `common`: the rungs, the case, the complaint.
    """
    return tuple(
        make(name, kind, edit, **{**common, **{_FIELDS[type(each)]: each for each in own}})
        for name, edit, *own in rows
    )
