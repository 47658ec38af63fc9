"""Name what inputs must hold that no predicate of a kernel's text shows, and find it in a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dsv4_router_runtime.artifacts.manifest import Kernel

from .cases import VOCABULARY, Case
from .inputs import Inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Test = Callable[[Case, Inputs], bool]

# Experts of a tile, and the fewest of five.
_TILE, _FIVE_TILES = 64, 257
# K of one block per CTA of a cluster.
_SPLITS = 16
_SPLIT_BLOCK = 64
_BLOCK = _SPLIT_BLOCK * _SPLITS
# So many that the chosen experts of 512 lie in most slots.
_MANY_ROWS = 7
# Ids, of 16 experts with nearly equal logits.
_NEAR_ENOUGH = 5
# Each is a pointer of its own, and a kernel tests first whether any of them is given.
_ROW_OPTIONS = ("images", "padding", "count", "table", "all_forced", "forced", "image_ids")
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
    return case.kind in kinds and not named and case.num_tokens > 2 and case.top_k > 3


def _own_ids(case: Case, inputs: Inputs) -> Array:
    """Return the token ids of the rows that no other option pads, forces or makes image rows."""
    import numpy as np

    tensors = inputs.tensors
    if "input_ids" not in tensors or {"all_forced", "empty"} & set(case.options):
        return np.zeros(0, np.int64)
    number = np.arange(case.num_tokens)
    own = number < int(tensors.get("num_valid_tokens", [case.num_tokens])[0])
    for name in ("padding_mask", "image_mask", "forced_mask"):
        if name in tensors:
            own &= tensors[name] == 0
    ids: Array = tensors["input_ids"][own]
    return ids


def _has_share(case: Case, inputs: Inputs, blocks: int) -> bool:
    """Return whether a CTA of a cluster has so many blocks of K, and each factor counts."""
    every = case.k // _SPLIT_BLOCK
    bounds = [cta * every // _SPLITS for cta in range(_SPLITS + 1)]
    shares = {after - before for before, after in pairwise(bounds)}
    return case.kind == "dense" and "empty" not in case.options and blocks in shares


def _ends_in(case: Case, inputs: Inputs, slot: int) -> bool:
    """Return whether the last expert is in a slot of some lanes alone, and all rows select."""
    return (
        (case.num_experts - 1) // 32 == slot
        and case.num_experts % 32 != 0
        and not {*_ROW_OPTIONS, "empty"} & set(case.options)
    )


def _has_unknown(case: Case, inputs: Inputs, test: Callable[[Array], Array]) -> bool:
    """Return whether some rows are padded for their token id alone, and it passes a test."""
    return "unknown" in case.options and bool(test(_own_ids(case, inputs)).any())


def _has_stray(case: Case, inputs: Inputs) -> bool:
    ids = _own_ids(case, inputs)
    return "stray" in case.options and bool(((ids >= 0) & (ids < VOCABULARY)).any())


def _is_alone(case: Case, inputs: Inputs, option: str) -> bool:
    """Return whether an option is the only one that makes rows differ."""
    return set(case.options) & {*_ROW_OPTIONS, "empty"} == {option} and case.num_tokens > 2


def _is_twice(case: Case, inputs: Inputs, place: int) -> bool:
    """Return whether a forced row is padded since the expert at a place comes once more, later."""
    forced = inputs.tensors.get("forced_ids")
    if forced is None or "empty" in case.options or place + 1 >= case.top_k:
        return False
    rows = forced[3 : case.num_tokens - 2 : 4]
    rows = rows[(rows < case.num_experts).all(1)]
    return bool((rows[:, place + 1 :] == rows[:, place, None]).any())


def _is_near(case: Case, inputs: Inputs, experts: int | None, divided: bool) -> bool:
    """Return whether a score that is off by one unit would change the ids of most rows.

    experts: how many, None for any. divided: whether by a temperature.
    """
    return (
        _selects(case, "near")
        and case.top_k >= _NEAR_ENOUGH
        and case.num_experts == (experts or case.num_experts)
        and divided == ("temperature" in case.options)
    )


def _has_both_signs(case: Case, inputs: Inputs, experts: int) -> bool:
    return _selects(case, "dense") and case.num_experts == experts


def _divides_infinity(case: Case, inputs: Inputs) -> bool:
    """Return whether a logit of a chosen expert is infinite, and divided by a temperature."""
    chosen = inputs.logical_ids[-1]
    return (
        {"nan", "temperature"} <= {case.kind, *case.options}
        and bool((chosen >= 0).all())
        and bool((inputs.logits[-1][chosen] == float("inf")).any())
    )


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
            rows = case.num_tokens >= _MANY_ROWS
            return _selects(case, kinds[0]) and rows and case.num_experts == experts

        yield _MERGES, 1, f"{name} among {experts - 127} to {experts} experts", is_merged
        yield ("select",), 1, f"{name} among {experts} experts", is_whole


# Roles, the least token tile, the name, and the test.
_GOALS: tuple[tuple[tuple[str, ...], int, str, Test], ...] = (
    *_by_groups("equal keys", "ties", "spread", "crowded"),
    *_by_groups("NaN for half, or all but three", "nans"),
    *((("select",), 1, f"keys of both signs among {experts} experts",
       partial(_has_both_signs, experts=experts)) for experts in _GROUPS),
    *((("select",), 1, f"nearly equal {quotients} among {experts} experts",
       partial(_is_near, experts=experts, divided=quotients == "quotients"))
      for experts in _GROUPS for quotients in ("logits", "quotients")),
    (("decode", "prefill"), 1, "nearly equal quotients",
     partial(_is_near, experts=None, divided=True)),
    (_ALL_ROLES, 1, "an infinite logit over a temperature", _divides_infinity),
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
     partial(_has_unknown, test=lambda ids: ids == VOCABULARY)),
    (_ALL_ROLES, 1, "a negative token id",
     partial(_has_unknown, test=lambda ids: ids < 0)),
    (_ALL_ROLES, 1, "a token id beyond 32 bits",
     partial(_has_unknown, test=lambda ids: ids > 2**32)),
    *((_MERGES, 1, f"rare outputs beside shared experts, {experts - 127} to {experts}",
       partial(_has_rare, experts=experts)) for experts in _GROUPS),
    (("select",), 1, "an expert of the table out of range",
     _has_stray),
    *((_GATES, 1, f"no option for rows but {option}", partial(_is_alone, option=option))
      for option in _ROW_OPTIONS),
    # router_hash loads up to 8 blocks at once, by a branch for each number of them.
    *((("hash",), 1, f"{blocks} blocks of K for a CTA, whose factors count",
       partial(_has_share, blocks=blocks)) for blocks in range(1, 9)),
    *((("select",), 1, f"the last expert in slot {slot}, and some lanes without it",
       partial(_ends_in, slot=slot)) for slot in range(16)),
    *((("hash",), 1, f"no option for rows but {option}", partial(_is_alone, option=option))
      for option in ("padding", "count", "all_forced")),
    *((_ALL_ROLES, 1, f"a forced id twice, first at place {place}",
       partial(_is_twice, place=place)) for place in range(7)),
    (("decode", "prefill"), 64, "tokens from 32 on with a map, in one tile",
     lambda case, inputs: _tokens_from_32_on(case) and case.num_experts <= _TILE),
    (("decode", "prefill"), 64, "tokens from 32 on with a map, in 5 tiles or more",
     lambda case, inputs: _tokens_from_32_on(case) and case.num_experts >= _FIVE_TILES),
    (_MULTIPLIES, 1, "a ring in its second turn, whose factors count",
     lambda case, inputs: case.kind == "dense" and case.k >= 9 * _BLOCK),
    (_MULTIPLIES, 1, "K that is no multiple of the split, whose factors count",
     lambda case, inputs: case.kind == "dense" and case.k > _BLOCK and case.k % _BLOCK != 0),
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
