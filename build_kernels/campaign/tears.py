"""Inputs that another stream rewrites while a launch reads them: torn at every load.

Each CTA that owns a token reads the row flags for itself. A write on another stream may come
between two of these reads, which then differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from build_kernels.evidence.cases import VOCABULARY
from build_kernels.evidence.inputs import FIRST_IMAGE_ID, NUM_IMAGE_IDS, Inputs
from build_kernels.evidence.outputs import FORCED_CANARIES

from .fault import Changes, Expected, Fault, Place, Scenario, Torn

EVERY_ROLE = ("decode", "prefill", "hash", "select")
MOST = 2**31 - 1
UNKNOWN_ID = -1


def torn(name: str, what: str, scenario: Scenario) -> Fault:
    """Return a row of the table."""
    return Fault(
        name=name,
        hazard="H1",
        what=what,
        place=Place.CPU,
        expected=Expected.WRONG_ROW_ONLY,
        scenario=scenario,
    )


def like(scenario: Scenario, *rows: int, **arrays: Changes) -> Scenario:
    """Return the scenario with changes of arrays that touch these rows."""
    return replace(scenario, tears=lambda inputs: Torn(rows=rows, arrays=arrays))


def next_token_id(inputs: Inputs) -> Torn:
    """Move row 3 to another row of the table."""
    token_id = (int(inputs.tensors["input_ids"][3]) + 1) % VOCABULARY
    return Torn(rows=(3,), arrays={"input_ids": {3: token_id}})


def other_experts(inputs: Inputs) -> Torn:
    """Give the token id of row 3 other experts."""
    ids, table = inputs.tensors["input_ids"], inputs.tensors["tid2eid"]
    first = int(ids[3]) * table.shape[1]
    experts = (table[ids[3]] + 1) % inputs.case.num_experts
    rows = tuple(row for row in range(len(ids)) if ids[row] == ids[3])
    return Torn(rows=rows, arrays={"tid2eid": {first + i: int(e) for i, e in enumerate(experts)}})


def selected(inputs: Inputs) -> list[tuple[int, int]]:
    """Return the experts of the last row, and the replica of each that it takes."""
    last = inputs.case.num_tokens - 1
    names, counts = inputs.tensors["to_physical"], inputs.tensors["logical_count"]
    taken = last % counts.clip(1, names.shape[1])
    experts = range(inputs.case.num_experts)
    return [(e, int(taken[e])) for e in experts if names[e, taken[e]] in inputs.ids[last]]


def forced_row(change: Callable[[list[int], int], list[int]]) -> Callable[[Inputs], Torn]:
    """Return a change of row 1's forced ids. change: from its experts and E, the new ids."""

    def tears(inputs: Inputs) -> Torn:
        ids = [int(expert) for expert in inputs.tensors["forced_ids"][1]]
        first = len(ids) + FORCED_CANARIES
        changed = change(ids, inputs.case.num_experts)
        return Torn(rows=(1,), arrays={"forced_ids": {first + i: e for i, e in enumerate(changed)}})

    return tears


def image_id(*, enters: bool) -> Callable[[Inputs], Torn]:
    """Return a change of a row's token id: to the first image's, or from an image's."""

    def tears(inputs: Inputs) -> Torn:
        place = inputs.tensors["input_ids"] - FIRST_IMAGE_ID
        is_image = (place >= 0) & (place < NUM_IMAGE_IDS)
        row = int((is_image != enters).argmax())
        return Torn(rows=(row,), arrays={"input_ids": {row: FIRST_IMAGE_ID - (not enters)}})

    return tears


def other_names(inputs: Inputs) -> Torn:
    """Give the experts of the last row other physical ids, which further rows may take too."""
    names = inputs.tensors["to_physical"]
    width = names.shape[1]
    changes = {e * width + replica: int(names[e, replica]) + 1 for e, replica in selected(inputs)}
    return Torn(rows=tuple(range(inputs.case.num_tokens)), arrays={"to_physical": changes})


def other_counts(inputs: Inputs) -> Torn:
    """Give the experts of the last row another number of replicas, some of them out of range."""
    changes = {e: MOST if i % 2 else replica for i, (e, replica) in enumerate(selected(inputs))}
    return Torn(rows=tuple(range(inputs.case.num_tokens)), arrays={"logical_count": changes})


def other_biases(name: str) -> Callable[[Inputs], Torn]:
    """Return a change of every bias, which changes the selection."""

    def tears(inputs: Inputs) -> Torn:
        changes = {i: float(bias) + i % 3 for i, bias in enumerate(inputs.tensors[name])}
        return Torn(rows=tuple(range(inputs.case.num_tokens)), arrays={name: changes})

    return tears


def other_hidden(inputs: Inputs) -> Torn:
    """Give row 0 another hidden state: BF16 ones."""
    return Torn(rows=(0,), arrays={"hidden_states": dict.fromkeys(range(inputs.case.k), 0x3F80)})


def last_row(name: str, value: int, *, image: bool) -> Callable[[Inputs], Torn]:
    """Return a change of the last row that is valid, and an image row or not."""

    def tears(inputs: Inputs) -> Torn:
        tensors = inputs.tensors
        row = max(
            row
            for row in range(int(tensors["num_valid_tokens"][0]))
            if not tensors["padding_mask"][row] and bool(tensors["image_mask"][row]) is image
        )
        return Torn(rows=(row,), arrays={name: {row: value}})

    return tears


def last_forced_row(inputs: Inputs) -> Torn:
    """Give the last row of valid forced ids other experts."""
    ids = inputs.tensors["forced_ids"]
    row = max(row for row in range(1, len(ids), 2) if row % 6 == 1)
    first = row * (ids.shape[1] + FORCED_CANARIES)
    experts = (ids[row] + 1) % inputs.case.num_experts
    return Torn(
        rows=(row,), arrays={"forced_ids": {first + i: int(e) for i, e in enumerate(experts)}}
    )


def last_rows_enter(inputs: Inputs) -> Torn:
    """Make the last two rows valid."""
    n = inputs.case.num_tokens
    return Torn(rows=(n - 2, n - 1), arrays={"num_valid_tokens": {0: n}})


# The last one has as many expert tiles as those between.
EXPERTS = (384, 128, 96, 65)
BETWEEN = tuple(number for number in range(66, 128) if number not in EXPERTS)
# Rows 0, 2 and 4 are images, rows 1 and 4 padding, rows 4 and 5 beyond the count: row 3 goes by the
# table, if there is one. A hash kernel has one whatever its options.
GATE = Scenario(
    options=("images", "padding", "count"),
    num_tokens=6,
    roles=("decode", "prefill", "select"),
    experts=EXPERTS,
)
TABLE = replace(GATE, options=("table", *GATE.options), roles=EVERY_ROLE)
IMAGES = replace(TABLE, roles=GATE.roles)
# Rows 1, 3 and 5 are forced; the ids of 3 and 5 are invalid.
FORCED = Scenario(options=("forced",), num_tokens=6, roles=EVERY_ROLE, experts=EXPERTS)
IMAGE_IDS = replace(FORCED, options=("image_ids",), roles=GATE.roles)
# Row 0 has a token id outside the table.
UNKNOWN = Scenario(options=("table", "unknown"), roles=EVERY_ROLE, experts=EXPERTS)
MAPS = Scenario(options=("physical",), roles=EVERY_ROLE, experts=EXPERTS)
LEAST_FILLED = 7  # so that a row of each kind is valid


def between(scenario: Scenario) -> Scenario:
    """Return the scenario for E = 66 .. 127 too."""
    return replace(scenario, between=BETWEEN)


def last_rows(
    prefix: str, what: str, role: str, num_tokens: Callable[[int], int]
) -> tuple[Fault, ...]:
    """Return the tears of the last rows of launches with this number of tokens, for one role.

    A quick run leaves out those of prefill, which take the time of ten others.
    """
    is_decode = role == "decode"
    gate = Scenario(
        options=TABLE.options,
        num_tokens=num_tokens,
        experts=(384, 65),
        quick=(65,) if is_decode else (),
        roles=(role,),
    )
    maps = replace(gate, options=("physical",), experts=(65,), every_moment=is_decode)
    rows = (
        ("padding", "padding_mask of the last row", gate, last_row("padding_mask", 1, image=False)),
        ("image", "image_mask of the last row", gate, last_row("image_mask", 0, image=True)),
        (
            *("token-id", "input_ids of the last row"),
            *(gate, last_row("input_ids", UNKNOWN_ID, image=False)),
        ),
        ("count", "num_tokens", replace(gate, experts=(65,)), last_rows_enter),
        ("map", "to_physical", maps, other_names),
        ("map-counts", "logical_count", maps, other_counts),
    )
    return tuple(
        torn(f"{prefix}-{name}-torn", f"{array}, {what}", replace(scenario, tears=tears))
        for name, array, scenario, tears in rows
    )


TEARS = (
    torn("padding-set", "padding_mask 0 -> 1", between(like(TABLE, 3, padding_mask={3: 1}))),
    torn("padding-clear", "padding_mask 1 -> 0", between(like(TABLE, 1, padding_mask={1: 0}))),
    torn("count-up", "num_tokens 4 -> 6", between(like(TABLE, 5, num_valid_tokens={0: 6}))),
    torn("count-down", "num_tokens 4 -> 3", between(like(TABLE, 3, num_valid_tokens={0: 3}))),
    torn("count-negative", "num_tokens 4 -> -1", like(TABLE, 0, 2, 3, num_valid_tokens={0: -1})),
    torn(
        "count-most",
        "num_tokens 4 -> 2^31 - 1",
        replace(like(TABLE, 5, num_valid_tokens={0: MOST}), every_moment=False),
    ),
    torn("image-set", "image_mask 0 -> 1", like(GATE, 3, image_mask={3: 1})),
    torn("image-clear", "image_mask 1 -> 0", like(GATE, 0, image_mask={0: 0})),
    torn(
        "hash-image-set",
        "image_mask 0 -> 1 in a hash layer: from the table to the gate",
        between(like(IMAGES, 3, image_mask={3: 1})),
    ),
    torn(
        "hash-image-clear",
        "image_mask 1 -> 0 in a hash layer: from the gate to the table",
        like(IMAGES, 0, image_mask={0: 0}),
    ),
    torn(
        "hash-image-id",
        "input_ids of an image row: it is not looked at",
        like(IMAGES, input_ids={2: UNKNOWN_ID}),
    ),
    torn(
        "token-id-leaves",
        "input_ids: a row of the table -> none",
        between(like(TABLE, 3, input_ids={3: UNKNOWN_ID})),
    ),
    torn(
        "token-id-enters",
        "input_ids: no row of the table -> one",
        like(UNKNOWN, 0, input_ids={0: 3}),
    ),
    torn(
        "token-id-moves",
        "input_ids: a row of the table -> another",
        replace(TABLE, tears=next_token_id),
    ),
    torn("table-torn", "tid2eid: other experts", replace(TABLE, tears=other_experts)),
    torn("forced-set", "forced_mask 0 -> 1", like(FORCED, 0, forced_mask={0: 1})),
    torn("forced-clear", "forced_mask 1 -> 0", like(FORCED, 1, forced_mask={1: 0})),
    torn(
        "forced-moves",
        "forced_ids: other experts",
        replace(FORCED, tears=forced_row(lambda ids, e: [(expert + 1) % e for expert in ids])),
    ),
    torn(
        "forced-twice",
        "forced_ids: an expert twice, which makes the row padding",
        replace(FORCED, tears=forced_row(lambda ids, e: [ids[1], *ids[1:]])),
    ),
    torn(
        "forced-none",
        "forced_ids: an id that is no expert",
        replace(FORCED, tears=forced_row(lambda ids, e: [*ids[:-1], e])),
    ),
    torn(
        "image-id-enters",
        "input_ids: no image's -> an image's",
        replace(IMAGE_IDS, tears=image_id(enters=True)),
    ),
    torn(
        "image-id-leaves",
        "input_ids: an image's -> no image's",
        replace(IMAGE_IDS, tears=image_id(enters=False)),
    ),
    torn(
        "map-torn",
        "to_physical: the physical ids of a row's experts",
        replace(MAPS, tears=other_names),
    ),
    torn(
        "map-counts-torn",
        "logical_count: the counts of a row's experts",
        replace(MAPS, tears=other_counts),
    ),
    torn(
        "bias-torn",
        "e_bias: every bias",
        replace(GATE, tears=other_biases("e_bias"), every_moment=False),
    ),
    torn(
        "image-bias-torn",
        "bias_vl: every bias",
        replace(GATE, tears=other_biases("bias_vl"), every_moment=False),
    ),
    torn(
        "hidden-torn",
        "hidden_states of a row",
        replace(GATE, tears=other_hidden, roles=("decode", "prefill")),
    ),
    torn(
        "pair-torn",
        "both masks of two rows",
        like(GATE, 0, 1, padding_mask={0: 1, 1: 0}, image_mask={0: 0, 1: 1}),
    ),
    torn(
        "all-torn",
        "the masks, the count and the token ids at one moment",
        between(
            like(
                *(replace(IMAGES, experts=(65,)), 0, 1, 2, 3, 5),
                padding_mask={0: 1, 1: 0},
                image_mask={2: 0, 3: 1},
                input_ids={1: 3},
                num_valid_tokens={0: 6},
            )
        ),
    ),
    *last_rows(
        *("filled", "more than half a tile", "decode"),
        lambda tile: max(LEAST_FILLED, tile // 2 + 1),
    ),
    *last_rows("whole", "a whole token tile", "prefill", lambda tile: tile),
    *last_rows(
        *("second", "in the second token tile", "prefill"),
        lambda tile: tile + LEAST_FILLED,
    ),
    torn(
        "second-forced-moves",
        "forced_ids, in the second token tile",
        replace(
            FORCED,
            num_tokens=lambda tile: tile + LEAST_FILLED,
            tears=last_forced_row,
            roles=("prefill",),
            experts=(65,),
            quick=(),
        ),
    ),
    torn(
        "bound-count-torn",
        "num_tokens, for the last row of a token tile and the first of the next",
        replace(
            GATE,
            num_tokens=lambda tile: tile + 1,
            tears=last_rows_enter,
            roles=("prefill",),
            experts=(65,),
        ),
    ),
)
