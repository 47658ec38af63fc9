"""List cases for the emulated rung by hand: sizes, kinds of inputs, and options."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4_router_runtime.artifacts.limits import MAX_EXPERTS
from dsv4_router_runtime.artifacts.manifest import Kernel

# Rows of a hash layer's table.
VOCABULARY = 11
SHARED_SLOTS = 2
# A case's options:
# images        bias_vl, and an image_mask
# temperature   gate_temp
# padding       a padding_mask, whose rows hold NaN
# count         num_tokens on the device, two less than the rows; the last two rows hold NaN
# physical      to_physical and logical_count, most of them out of range
# few           with physical: fewer replicas than a warp has lanes
# shared        SHARED_SLOTS, of a weight that is not 1
# unnormed      norm_topk_prob is off
# int64         int64 ids, and int64 token ids if there are any
# table         tid2eid and input_ids, for a kernel that does not need them
# unknown       some of input_ids outside the table, by one, and by 2^32 if they are int64
# stray         with a table, of router_topk alone: some of its experts out of range
# image_ids     image rows by token id, with bias_vl and input_ids
# forced        forced_ids for every second row, some of them no row of experts; int64 with int64
# all_forced    the same for every row, without a mask
# empty         num_tokens on the device, 0
# mapped64      to_physical and logical_count in int64, with physical
# logical       out_logical_ids
# logits        out_logits
# bfloat16      weights in BF16
GATE_OPTIONS = (
    *("images", "temperature", "padding", "count", "physical", "shared", "unnormed", "int64"),
)
TABLE_OPTIONS = (
    *("unknown", "temperature", "padding", "count", "physical", "shared", "unnormed", "int64"),
)
# For a kernel that takes both a table and biases. Image rows use no token id.
MIXED_OPTIONS = ("table", "images", *TABLE_OPTIONS)
# Options of engines: for a gate, and for a hash layer.
ENGINE_OPTIONS = ("forced", "physical", "mapped64", "logical", "bfloat16", "shared")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: its sizes, the options of the list above that are on, and the kind of inputs.

    integers   small integers, biases in quarters
    ties       logits all equal: ids must be 0 .. top_k - 1
    crowded    the best experts are neighbours, in some rows with equal logits
    biased     integers, with biases near 8 as real checkpoints have
    extreme    logits beyond +-100
    spread     the same, with the best experts in as many tiles and lanes as there are
    low        all logits near -100: softplus would be denormal, and epsilon counts; biases below 0
    nan        one expert's weights NaN, and one token's row of hidden_states infinite
    nans       about half of all experts' weights NaN; of every second token, all logits but three
    dense      no factor is 0, and keys may be as near as FP32 has them
    wide       of router_topk alone: one logit of each row is so large that its estimate
               overflows, and by their biases the others' keys are larger
    near       the best experts' logits follow each other in FP32, far from the other experts'

    first_token: of the call's, that of a prefill launch; a multiple of its token tile.
    """

    num_tokens: int
    num_experts: int
    top_k: int
    k: int = 0
    kind: str = "integers"
    options: tuple[str, ...] = ()
    first_token: int = 0

    def __str__(self) -> str:
        k = f" K={self.k}" if self.k else ""
        options = f" with {', '.join(self.options)}" if self.options else ""
        first = f" from token {self.first_token}" if self.first_token else ""
        sizes = f"N={self.num_tokens} E={self.num_experts}{k} top_k={self.top_k}"
        return f"{sizes} {self.kind}{options}{first}"

    @property
    def launched_tokens(self) -> int:
        """Return the number of tokens that the launch routes."""
        return self.num_tokens - self.first_token

    @property
    def columns(self) -> int:
        """Return the number of columns of the outputs."""
        return self.top_k + (SHARED_SLOTS if "shared" in self.options else 0)


def _crowded(num_experts: int, k: int, *, top_k: tuple[int, ...]) -> tuple[Case, ...]:
    """Return cases of equal keys in one lane, and of a lane with more than four of the best."""
    case = Case(num_tokens=3, num_experts=num_experts, top_k=1, k=k, kind="crowded")
    return tuple(replace(case, top_k=each) for each in top_k)


def decode_cases(kernel: Kernel) -> tuple[Case, ...]:
    """Return N from 1 to the tile, ragged E, several K, a V4-Flash and a V4-Pro layer.

    K of 16 blocks gives each CTA of the cluster one; of 33, one of them a third; of one block, 15
    none. With 17 each, the ring of 8 blocks is in its third turn.
    """
    tile = kernel.launch.token_tile
    block = kernel.problem.k_multiple * kernel.launch.k_splits
    one = kernel.problem.k_multiple
    images = ("image_ids", "logits", *ENGINE_OPTIONS)
    served = ("temperature", "physical", "shared")
    return (
        Case(num_tokens=min(7, tile), num_experts=60, top_k=6, k=2 * block + one),
        Case(num_tokens=1, num_experts=132, top_k=4, k=one, kind="biased"),
        *_crowded(132, one, top_k=(6, 8)),
        # All experts chosen, so that every score counts.
        Case(num_tokens=3, num_experts=8, top_k=8, k=block, kind="nan"),
        Case(num_tokens=2, num_experts=8, top_k=8, k=block, kind="low"),
        Case(num_tokens=7, num_experts=132, top_k=6, k=block, options=GATE_OPTIONS),
        Case(num_tokens=7, num_experts=72, top_k=6, k=block, options=MIXED_OPTIONS),
        Case(num_tokens=7, num_experts=68, top_k=6, k=block, options=images),
        Case(num_tokens=tile, num_experts=40, top_k=8, k=one, options=("table", *images)),
        Case(num_tokens=5, num_experts=200, top_k=3, k=one, options=("int64", "forced", "logits")),
        Case(num_tokens=tile - 1, num_experts=40, top_k=8, k=block, options=("table", "images")),
        Case(num_tokens=3, num_experts=512, top_k=8, k=one, options=GATE_OPTIONS),
        Case(num_tokens=5, num_experts=40, top_k=8, k=block, options=("images", "shared")),
        Case(num_tokens=tile, num_experts=64, top_k=8, k=block),
        Case(num_tokens=min(16, tile), num_experts=128, top_k=3, k=2 * block, kind="biased"),
        Case(num_tokens=tile - 1, num_experts=216, top_k=6, k=block, options=GATE_OPTIONS),
        Case(num_tokens=3, num_experts=96, top_k=6, k=block, kind="nan"),
        Case(num_tokens=2, num_experts=40, top_k=1, k=block, kind="extreme"),
        Case(num_tokens=2, num_experts=70, top_k=8, k=block, kind="ties"),
        *_crowded(384, one, top_k=(3, 8)),
        *_crowded(512, one, top_k=(3, 8)),
        Case(num_tokens=5, num_experts=40, top_k=6, k=17 * block),
        Case(num_tokens=6, num_experts=256, top_k=6, k=4096, kind="biased", options=("count",)),
        Case(num_tokens=1, num_experts=384, top_k=6, k=7168, kind="biased", options=served),
    )


def prefill_cases(kernel: Kernel) -> tuple[Case, ...]:
    """Return N below, at and above a token tile; E that leaves M tiles ragged or empty.

    With 9 K blocks each, the rings of 4 and of 8 blocks are in a later turn.
    """
    tile, experts = kernel.launch.token_tile, kernel.launch.expert_tile
    block = kernel.problem.k_multiple * kernel.launch.k_splits
    one = kernel.problem.k_multiple
    images = ("image_ids", "logits", *ENGINE_OPTIONS)
    served = ("temperature", "physical", "shared")
    most = kernel.problem.num_experts.high or experts
    return (
        Case(num_tokens=tile + 1, num_experts=60, top_k=6, k=one, kind="biased"),
        Case(num_tokens=7, num_experts=100, top_k=4, k=9 * block),
        *_crowded(132, one, top_k=(6, 8)),
        Case(num_tokens=3, num_experts=8, top_k=8, k=block, kind="nan"),
        Case(num_tokens=tile + 7, num_experts=72, top_k=6, k=one, options=MIXED_OPTIONS),
        Case(num_tokens=9, num_experts=experts + 4, top_k=6, k=block, options=images),
        second_launch(kernel),
        Case(num_tokens=tile - 1, num_experts=40, top_k=8, k=one, options=("table", *images)),
        Case(num_tokens=tile, num_experts=experts, top_k=8, k=block),
        Case(num_tokens=2 * tile, num_experts=2 * experts - 1, top_k=6, k=2 * block + one),
        Case(num_tokens=2 * tile + 1, num_experts=100, top_k=6, k=one, options=GATE_OPTIONS),
        Case(num_tokens=5, num_experts=200, top_k=3, k=one, options=("int64", "forced", "logits")),
        Case(num_tokens=3, num_experts=most, top_k=8, k=one, options=GATE_OPTIONS),
        Case(num_tokens=2, num_experts=70, top_k=8, k=block, kind="ties"),
        *_crowded(384, one, top_k=(3, 8)),
        *_crowded(512, one, top_k=(3, 8)),
        Case(num_tokens=2, num_experts=40, top_k=1, k=block, kind="extreme"),
        Case(num_tokens=2, num_experts=8, top_k=8, k=block, kind="low"),
        Case(num_tokens=33, num_experts=256, top_k=6, k=4096, kind="biased", options=("count",)),
        Case(num_tokens=1, num_experts=384, top_k=6, k=7168, kind="biased", options=served),
        *later_launches(kernel),
    )


def second_launch(kernel: Kernel) -> Case:
    """Return the second launch of a call to a prefill kernel, with two owners of each token.

    Its workspace counts from its first token. With 9 K blocks per CTA every ring is in its second
    turn.
    """
    tile, block = kernel.launch.token_tile, kernel.problem.k_multiple * kernel.launch.k_splits
    return Case(
        num_tokens=tile + 67,
        num_experts=kernel.launch.expert_tile + 4,
        top_k=6,
        k=9 * block,
        kind="dense",
        first_token=tile,
    )


def later_launches(kernel: Kernel) -> tuple[Case, ...]:
    """Return later launches of calls with options: masks, ids and outputs have the call's rows."""
    tile, experts = kernel.launch.token_tile, kernel.launch.expert_tile
    images = ("image_ids", "logits", *ENGINE_OPTIONS)
    table = ("table", "images", "int64", "forced", "logits", "logical")
    # Every row is padding: the count ends before the launch begins.
    empty = ("empty", "bfloat16", "all_forced")
    return tuple(
        Case(
            num_tokens=first + more,
            num_experts=num_experts,
            top_k=top_k,
            k=kernel.problem.k_multiple,
            options=options,
            first_token=first,
        )
        for first, more, num_experts, top_k, options in (
            (tile, 7, experts + 4, 6, GATE_OPTIONS),
            (tile, 9, experts + 4, 6, images),
            (2 * tile, 7, 2 * experts + 4, 5, MIXED_OPTIONS),
            (tile, 6, 40, 8, table),
            (tile, 3, MAX_EXPERTS, 8, empty),
        )
    )


def wide_cases() -> tuple[Case, ...]:
    """Return a case of router_topk with a row per slot of a lane, for each number of groups."""
    return tuple(
        Case(num_tokens=experts // 32, num_experts=experts, top_k=top_k, kind="wide")
        for experts, top_k in ((128, 8), (256, 6), (384, 6), (512, 1))
    )


def hash_cases(kernel: Kernel) -> tuple[Case, ...]:
    """Return N below, at and above a cluster's tokens; K of one block per CTA and of many."""
    tile = kernel.launch.token_tile
    block = kernel.problem.k_multiple * kernel.launch.k_splits
    one = kernel.problem.k_multiple
    served = ("temperature", "physical", "shared")
    return (
        Case(num_tokens=tile + 1, num_experts=60, top_k=6, k=2 * block + one),
        Case(num_tokens=3, num_experts=8, top_k=8, k=block, kind="nan"),
        Case(num_tokens=2, num_experts=8, top_k=8, k=block, kind="low"),
        Case(num_tokens=tile + 3, num_experts=40, top_k=6, k=block, options=TABLE_OPTIONS),
        Case(num_tokens=tile - 1, num_experts=40, top_k=6, k=one, options=ENGINE_OPTIONS),
        Case(num_tokens=tile + 2, num_experts=40, top_k=3, k=one, options=("int64", "forced")),
        Case(num_tokens=5, num_experts=72, top_k=8, k=one, options=("unknown", "shared")),
        Case(num_tokens=1, num_experts=512, top_k=1, k=block),
        Case(num_tokens=tile, num_experts=132, top_k=8, k=block, kind="extreme"),
        Case(num_tokens=5, num_experts=40, top_k=4, k=17 * block),
        Case(num_tokens=6, num_experts=256, top_k=6, k=4096),
        Case(num_tokens=7 * tile, num_experts=384, top_k=6, k=7168, options=served),
    )


def topk_cases(kernel: Kernel) -> tuple[Case, ...]:
    """Return N below, at and above a block's tokens; each number of register groups."""
    images = ("image_ids", *ENGINE_OPTIONS)
    return (
        Case(num_tokens=7, num_experts=132, top_k=6),
        Case(num_tokens=4, num_experts=512, top_k=8, kind="biased"),
        Case(num_tokens=3, num_experts=8, top_k=8, kind="nan"),
        Case(num_tokens=2, num_experts=8, top_k=8, kind="low"),
        Case(num_tokens=7, num_experts=132, top_k=6, options=GATE_OPTIONS),
        Case(num_tokens=7, num_experts=40, top_k=6, options=MIXED_OPTIONS),
        Case(num_tokens=7, num_experts=68, top_k=6, options=images),
        Case(num_tokens=9, num_experts=40, top_k=8, options=("table", *images)),
        Case(num_tokens=5, num_experts=200, top_k=3, options=("int64", "forced")),
        Case(num_tokens=9, num_experts=384, top_k=3, kind="biased", options=GATE_OPTIONS),
        Case(num_tokens=5, num_experts=60, top_k=8, options=("table", "shared")),
        Case(num_tokens=1, num_experts=8, top_k=8),
        Case(num_tokens=16, num_experts=384, top_k=6, kind="biased"),
        Case(num_tokens=5, num_experts=256, top_k=6, kind="extreme"),
        Case(num_tokens=3, num_experts=130, top_k=4, kind="nan"),
        Case(num_tokens=2, num_experts=70, top_k=8, kind="ties"),
        *_crowded(384, 0, top_k=(3, 8)),
        Case(num_tokens=66, num_experts=60, top_k=1),
    )


def listed_cases(kernel: Kernel) -> tuple[Case, ...]:
    """Return the kernel's cases by hand: sizes of real layers, and what a pipeline's turns need."""
    cases = {
        "decode": decode_cases,
        "prefill": prefill_cases,
        "hash": hash_cases,
        "select": topk_cases,
    }
    return cases[kernel.role](kernel)
