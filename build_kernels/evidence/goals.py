"""Name what inputs must hold that no predicate of a kernel's text shows, and find it in a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dsv4_router_runtime.artifacts.manifest import Kernel

from .cases import VOCABULARY, Case
from .inputs import Inputs

if TYPE_CHECKING:
    Test = Callable[[Case, Inputs], bool]

# Experts of a tile, and the fewest of five.
_TILE, _FIVE_TILES = 64, 257
# K of one block per CTA of a cluster.
_SPLITS = 16
_BLOCK = 64 * _SPLITS
_GATES = ("decode", "prefill", "select")
_MULTIPLIES = ("decode", "prefill", "hash")


def _clamps(case: Case, inputs: Inputs, *, low: bool) -> bool:
    """Return whether a count of a chosen expert is below 1, or above the number of replicas."""
    import numpy as np

    if "physical" not in case.options:
        return False
    count = inputs.tensors["logical_count"].astype(np.int32)
    of_ids = count[inputs.logical_ids[(inputs.logical_ids >= 0).all(1)]]
    replicas = inputs.tensors["to_physical"].shape[1]
    return bool((of_ids < 1).any() if low else (of_ids > replicas).any())


def _padded(inputs: Inputs) -> bool:
    return bool((inputs.ids[:, 0] == -1).any())


def _selects(case: Case, *kinds: str) -> bool:
    """Return whether inputs are of these kinds and the keys of some rows decide their ids."""
    named = {"table", "all_forced", "empty"} & set(case.options)
    return case.kind in kinds and not named and case.num_tokens > 2 and case.top_k > 2


def _has_rare(case: Case, inputs: Inputs, experts: int) -> bool:
    """Return whether a lane of a shared expert comes where BF16 weights or logical ids are."""
    rare = {"bfloat16", "logical"} & set(case.options)
    return bool(rare) and "shared" in case.options and experts - 128 < case.num_experts <= experts


def _tokens_from_32_on(case: Case) -> bool:
    return case.num_tokens > 33 and "physical" in case.options


_ALL_ROLES = ("decode", "prefill", "hash", "select")
# Decode merges 2 tiles of 64 experts by one code, 3 or 4 by another, and so 5 or 6, and 7 or 8. As
# many groups of registers does router_topk have, and each slot of a lane counts there.
_GROUPS = (128, 256, 384, 512)
# Prefill merges by decode's code.
_MERGES = ("decode",)


def _by_groups(name: str, *kinds: str) -> Iterator[tuple[tuple[str, ...], int, str, Test]]:
    """Yield the goals of some kinds of inputs, for each number of tiles or groups."""
    for experts in _GROUPS:

        def is_merged(case: Case, inputs: Inputs, experts: int = experts) -> bool:
            return _selects(case, *kinds) and experts - 128 < case.num_experts <= experts

        def is_whole(case: Case, inputs: Inputs, experts: int = experts) -> bool:
            return _selects(case, kinds[0]) and case.num_experts == experts

        yield _MERGES, 1, f"{name} among {experts - 127} to {experts} experts", is_merged
        yield ("select",), 1, f"{name} among {experts} experts", is_whole


# Roles, the least token tile, the name, and the test.
_GOALS: tuple[tuple[tuple[str, ...], int, str, Test], ...] = (
    *_by_groups("equal keys", "ties", "spread", "crowded"),
    *_by_groups("NaN for half", "nans"),
    (_GATES, 1, "equal keys in 5 tiles or more, with others between",
     lambda case, inputs: _selects(case, "spread") and case.num_experts >= _FIVE_TILES),
    (_GATES, 1, "an expert beyond the last would be chosen",
     lambda case, inputs: _selects(case, "low") and case.num_experts % _TILE != 0),
    (_ALL_ROLES, 1, "int64 ids of a padded row",
     lambda case, inputs: "int64" in case.options and _padded(inputs)),
    (_ALL_ROLES, 1, "a chosen expert with a count below 1",
     lambda case, inputs: _clamps(case, inputs, low=True)),
    (_ALL_ROLES, 1, "a chosen expert with a count above the replicas",
     lambda case, inputs: _clamps(case, inputs, low=False)),
    (_ALL_ROLES, 1, "a token id one beyond the table",
     lambda case, inputs: "unknown" in case.options
     and bool((inputs.tensors["input_ids"] == VOCABULARY).any())),
    (_ALL_ROLES, 1, "a negative token id",
     lambda case, inputs: "unknown" in case.options
     and bool((inputs.tensors["input_ids"] < 0).any())),
    (_ALL_ROLES, 1, "a token id beyond 32 bits",
     lambda case, inputs: "unknown" in case.options
     and bool((inputs.tensors["input_ids"] > 2**32).any())),
    *((_MERGES, 1, f"rare outputs beside shared experts, {experts - 127} to {experts}",
       partial(_has_rare, experts=experts)) for experts in _GROUPS),
    (("select",), 1, "an expert of the table out of range",
     lambda case, inputs: "stray" in case.options),
    (("decode", "prefill"), 64, "tokens from 32 on with a map, in one tile",
     lambda case, inputs: _tokens_from_32_on(case) and case.num_experts <= _TILE),
    (("decode", "prefill"), 64, "tokens from 32 on with a map, in 5 tiles or more",
     lambda case, inputs: _tokens_from_32_on(case) and case.num_experts >= _FIVE_TILES),
    (_MULTIPLIES, 1, "a ring in its second turn", lambda case, inputs: case.k >= 9 * _BLOCK),
    (_MULTIPLIES, 1, "K that is no multiple of the split",
     lambda case, inputs: case.k > _BLOCK and case.k % _BLOCK != 0),
)  # fmt: skip


def goals_of(kernel: Kernel) -> list[str]:
    """Return the names of what a kernel's cases must hold."""
    tile = kernel.launch.token_tile
    return [name for roles, least, name, _ in _GOALS if kernel.role in roles and tile >= least]


def goals_met(kernel: Kernel, inputs: Inputs) -> set[str]:
    """Return the names of what a case's inputs hold."""
    wanted = set(goals_of(kernel))
    # The goals of K are those of 16 CTAs that share it.
    case = replace(inputs.case, k=inputs.case.k * _SPLITS // kernel.launch.k_splits)
    return {name for *_, name, test in _GOALS if name in wanted and test(case, inputs)}
