"""The prefill kernels that the mutants are made from, and the cases that they run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from build_kernels.evidence.cases import Case
from build_kernels.mutants.mutant import Edit, Mutant

from .kernels import BLOCK_K, mutant

# One owner with two M tiles; two owners; two token tiles; two pairs per CTA of a cluster of 16, two
# rounds per epilogue warp of a cluster of 8.
ONE = Case(num_tokens=7, num_experts=100, top_k=6, k=64)
TWO_OWNERS = replace(ONE, num_experts=132)
TWO_TOKEN_TILES = replace(ONE, num_tokens=70)
TWO_TILES_TWO_OWNERS = replace(TWO_TOKEN_TILES, num_experts=132)
# Tickets of 128 tokens behind the first tile's 64: under SCHEDULES, those of 64 met no candidate of
# the sm_90a kernel.
FULL_TILES_TWO_OWNERS = replace(TWO_TILES_TWO_OWNERS, num_tokens=192)
TWO_PAIRS = TWO_ROUNDS = replace(ONE, num_tokens=40)
# The rings of 8 and of 7 blocks are in a later turn.
WRAPS = replace(ONE, k=9 * BLOCK_K)
# A block of each slice of K; three, with which the ring of a CTA of four slices is in a later turn.
SLICES = replace(ONE, k=BLOCK_K)
LONG_SLICES = replace(ONE, k=3 * BLOCK_K)
SLICES_OF_TWO_OWNERS = replace(SLICES, num_experts=132)
# The second launch of a call.
SECOND_LAUNCH = replace(TWO_OWNERS, num_tokens=70, first_token=64)


def _maker(kernel: str, prefix: str, case: Case) -> Callable[..., Mutant]:
    """Return a maker of mutants of a prefill kernel, with names that begin with the prefix."""

    def make(name: str, kind: str, *edits: Edit, **more: Any) -> Mutant:
        return mutant(
            f"router_prefill_{kernel}", prefix + name, kind, *edits, **{"case": case, **more}
        )

    return make


n64 = _maker("kmajor_n64.sm_90a", "prefill: ", ONE)
emajor = _maker("emajor_n64.sm_90a", "prefill, emajor: ", ONE)
sm100 = _maker("kmajor_n64.sm_100a", "prefill, sm_100: ", ONE)
n64_k8 = _maker("kmajor_n64_k8.sm_90a", "prefill, 8 CTAs: ", SLICES)
n64_k4 = _maker("kmajor_n64_k4.sm_90a", "prefill, 4 CTAs: ", SLICES)
n128_k4_sm100 = _maker("kmajor_n128_k4.sm_100a", "prefill, 4 CTAs, sm_100: ", SLICES)


def given(*options: str, case: Case = ONE) -> Case:
    """Return a case with these options."""
    return replace(case, options=options)


def written(pattern: str, value: str, nth: int | None = None) -> Edit:
    """Write another value between the two groups of the pattern."""
    return Edit(pattern=pattern, replacement=rf"\g<1>{value}\g<2>", nth=nth)
