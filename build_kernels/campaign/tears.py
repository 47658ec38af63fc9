"""Inputs that another stream rewrites while a launch reads them: torn at every load.

Each CTA that owns a token reads the row flags for itself, so a write on another stream shows one of
them the old value and another the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from build_kernels.evidence.cases import VOCABULARY
from build_kernels.evidence.inputs import Inputs

from .fault import Changes, Expected, Fault, Place, Scenario

EVERY_ROLE = ("decode", "hash", "select")
MOST = 2**31 - 1


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


def changes(**arrays: Changes) -> Callable[[Inputs], Mapping[str, Changes]]:
    """Return the same changes for all inputs."""
    return lambda inputs: arrays


def next_token_id(inputs: Inputs) -> Mapping[str, Changes]:
    """Move row 0 to another row of the table."""
    return {"input_ids": {0: (int(inputs.tensors["input_ids"][0]) + 1) % VOCABULARY}}


def other_names(inputs: Inputs) -> Mapping[str, Changes]:
    """Give every replica another physical id."""
    names = inputs.tensors["to_physical"].reshape(-1)
    return {"to_physical": {i: int(name) + 1 for i, name in enumerate(names)}}


def other_counts(inputs: Inputs) -> Mapping[str, Changes]:
    """Give every expert another number of replicas, some of them out of range."""
    counts = inputs.tensors["logical_count"]
    return {"logical_count": {i: MOST if i % 5 == 0 else i - 1 for i in range(len(counts))}}


# Row 1 of the mask is padding, rows 0, 2, .. are images, all but two rows are valid, and row 0 of
# "unknown" has a token id outside the table.
PADDING = Scenario(options=("padding",), roles=EVERY_ROLE)
COUNT = Scenario(options=("count",), roles=EVERY_ROLE, num_tokens=3)
IMAGES = Scenario(options=("images",), roles=("decode", "select"))
# A hash kernel has a table whatever its options.
TABLE = Scenario(options=("table",), roles=EVERY_ROLE)
UNKNOWN = Scenario(options=("table", "unknown"), roles=EVERY_ROLE)
MAPS = Scenario(options=("physical",), roles=EVERY_ROLE)
BETWEEN = tuple(range(66, 128))
PAIR = Scenario(options=("images", "padding"), experts=BETWEEN, quick=(97,))
ALL = Scenario(
    options=("images", "padding", "count"),
    num_tokens=7,
    experts=BETWEEN,
    quick=(97,),
    at_every_load=False,
)


def like(scenario: Scenario, *rows: int, **arrays: Changes) -> Scenario:
    """Return the scenario with changes of arrays that touch these rows."""
    return replace(scenario, tears=changes(**arrays), torn_rows=rows)


TEARS = (
    torn("padding-set", "padding_mask 0 -> 1", like(PADDING, 0, padding_mask={0: 1})),
    torn("padding-clear", "padding_mask 1 -> 0", like(PADDING, 1, padding_mask={1: 0})),
    torn("count-up", "num_tokens 1 -> 2", like(COUNT, 1, num_valid_tokens={0: 2})),
    torn("count-down", "num_tokens 1 -> 0", like(COUNT, 0, num_valid_tokens={0: 0})),
    torn("count-negative", "num_tokens 1 -> -1", like(COUNT, 0, num_valid_tokens={0: -1})),
    torn("count-most", "num_tokens 1 -> 2^31 - 1", like(COUNT, 1, 2, num_valid_tokens={0: MOST})),
    torn("image-set", "image_mask 0 -> 1", like(IMAGES, 1, image_mask={1: 1})),
    torn("image-clear", "image_mask 1 -> 0", like(IMAGES, 0, image_mask={0: 0})),
    torn(
        "token-id-leaves",
        "input_ids: a row of the table -> none",
        like(TABLE, 0, input_ids={0: -1}),
    ),
    torn(
        "token-id-enters",
        "input_ids: no row of the table -> one",
        like(UNKNOWN, 0, input_ids={0: 3}),
    ),
    torn(
        "token-id-moves",
        "input_ids: a row of the table -> another",
        replace(TABLE, tears=next_token_id, torn_rows=(0,)),
    ),
    torn(
        "map-torn",
        "to_physical: every physical id",
        replace(MAPS, tears=other_names, torn_rows=(0, 1)),
    ),
    torn(
        "map-counts-torn",
        "logical_count: every count",
        replace(MAPS, tears=other_counts, torn_rows=(0, 1)),
    ),
    torn(
        "pair-torn",
        "both masks of two rows, E = 66..127",
        like(PAIR, 0, 1, padding_mask={0: 1, 1: 0}, image_mask={0: 0, 1: 1}),
    ),
    torn(
        "all-torn",
        "the masks and the count of seven rows, at one load for each E = 66..127",
        like(
            *(ALL, 0, 1, 2, 3, 5, 6),
            padding_mask={0: 1, 1: 0},
            image_mask={2: 0, 3: 1},
            num_valid_tokens={0: 7},
        ),
    ),
)
