"""Draw cases by number: sizes about the edges of a kernel's tiles, every kind and option."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from dsv4_router_runtime.artifacts.manifest import Kernel

from .cases import Case

# About the edges of a lane's experts, of a tile, of a register group and of the whole range.
EXPERTS = (
    *(8, 31, 40, 64, 65, 100, 128, 129, 192, 200, 256, 257),
    *(320, 330, 384, 384, 385, 416, 448, 449, 512, 512),
)
KINDS = (
    *("integers", "biased", "crowded", "spread", "ties", "extreme", "low", "nan", "nans", "nans"),
    *("dense", "dense", "near", "near"),
)
# In router_topk: the last expert in each of a lane's slots, and whole groups of slots.
SLOTS = (*range(13, 512, 32), 128, 128, 256, 256, 384, 512)
# Of nearly equal keys: each of a lane's experts counts if all lanes have one.
NEAR_EXPERTS = (40, 64, 100, 128, 192, 256, 384, 512)
# Of a role, and of one that may go without a table.
_COMMON = ("temperature", "padding", "count", "empty", "shared", "unnormed", "int64", "bfloat16")
_MOST_OPTIONS = 6
# Of the kinds whose rows differ by a row of W_gate each; near has 8 places for its logits.
_MOST_ROWS = 8
_ONE_BLOCK_FROM = 256
# A minute for 9 blocks of K each, in prefill.
_MANY_LOGITS = 2048


def draw(kernel: Kernel, number: int) -> Case:
    """Return one of a kernel's cases; the same number gives kernels of a role the same options."""
    random = Random(f"{kernel.role} {number}")
    kind = random.choice(KINDS)
    options = _options(kernel, random, kind)
    tile, most = kernel.launch.token_tile, kernel.problem.num_tokens.high
    tokens = [1, 2, 3, 5, 7, 33, tile - 1, tile // 2 + 1, tile, tile + 1, 2 * tile + 1]
    num_tokens = random.choice(tokens)
    experts = EXPERTS + SLOTS if kernel.role == "select" else EXPERTS
    num_experts, top_k = random.choice(experts), random.choice((1, 2, 3, 4, 5, 6, 7, 8, 8, 8))
    k = 0
    if kernel.role != "select":
        one = kernel.problem.k_multiple
        block = one * kernel.launch.k_splits
        # A CTA's blocks of K: one in one CTA alone, or up to a ring of 8 and one more in each.
        k = random.randint(1, 9) * block + random.choice((0, one))
        # Seconds each: the loop over K is the same for every tile.
        if num_experts >= _ONE_BLOCK_FROM or random.random() < 0.6:
            k = one
    if kind == "extreme":
        # Or all experts are chosen, those with a denormal score too.
        num_experts = max(num_experts, 64)
    if kind == "near":
        num_experts = random.choice(NEAR_EXPERTS)
    if kind in ("crowded", "spread"):
        num_tokens = min(num_tokens, _MOST_ROWS)
    if kind == "near":
        num_tokens = _MOST_ROWS
    if most is not None:
        num_tokens = min(num_tokens, most)
    if kernel.role == "prefill" and num_tokens * num_experts > _MANY_LOGITS:
        k = kernel.problem.k_multiple
    return Case(
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        k=k,
        kind=kind,
        options=options,
    )


def _options(kernel: Kernel, random: Random, kind: str) -> tuple[str, ...]:
    """Draw options that go together: see the list in `cases`."""
    hashed = kernel.role == "hash"
    possible = [*_COMMON, "physical", "logical"]
    # A table or a caller could choose an expert whose score is denormal, or that is not near.
    if kind not in ("extreme", "near"):
        possible += ["forced"] if hashed else ["forced", "table", "table"]
    if not hashed:
        possible += ["images", "image_ids"]
    if kernel.role in ("decode", "prefill"):
        possible.append("logits")
    chosen = set(random.sample(possible, random.randint(0, _MOST_OPTIONS)))
    if kind == "near" and random.random() < 0.5:
        chosen.add("temperature")
    dependent = {"physical": ("few", "mapped64"), "forced": ("all_forced",)}
    dependent["table"] = ("unknown", "stray") if kernel.role == "select" else ("unknown",)
    for option in sorted(chosen | ({"table"} if hashed else set())):
        for each in dependent.get(option, ()):
            if random.random() < 0.5:
                chosen.add(each)
    if "all_forced" in chosen:
        chosen.remove("forced")
    return tuple(sorted(chosen))


def smallest(reached: Mapping[int, set[Any]], cost: Mapping[int, float]) -> list[int]:
    """Return numbers that reach together what all reach, by the most gain for the cost."""
    missing = set[Any]().union(*reached.values())
    chosen: list[int] = []
    while missing:
        best = max(reached, key=lambda each: len(reached[each] & missing) / cost[each])
        missing -= reached[best]
        chosen.append(best)
    for each in tuple(chosen):
        others = [reached[other] for other in chosen if other != each]
        if reached[each] <= set[Any]().union(*others):
            chosen.remove(each)
    return chosen
