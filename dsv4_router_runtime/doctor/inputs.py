"""The self-test's inputs and their exact results, in plain Python: neither torch nor NumPy.

All numbers are small integers, so that every product and sum is exact in FP32 in any order. The
results are computed on the CPU: not on the GPU in doubt.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from dsv4_router_runtime.artifacts.kernel import LAYOUTS

K, EXPERTS, TOP_K, SCALE = 512, 384, 6, 2.5
# N = 1, the largest of each step of these layers, and the smallest that takes a matrix product.
TOKENS = (1, 8, 32, 64, 128, 320, 640, 641)
# Of the step that same_bits adds the largest N, and the smallest that is two launches of it.
TOKENS_OF_SAME_BITS = (1280, 1281)
MAX_TOKENS = max(TOKENS_OF_SAME_BITS)
# Few, so that no logit is so low that two keys are nearly equal; of more than a tile of tokens.
DISTINCT_ROWS = 65
VOCABULARY = 128
# Elements of x that are not left zero.
DENSITY = 0.02
EPSILON = 1e-20
# The values of x and W_gate, drawn by their place here, and the two bytes of each as BF16.
VALUES = (-2, -1, 0, 1, 2)
_ZERO = VALUES.index(0)
_BF16_BYTES = (bytes([0, 0x80, 0, 0x80, 0]), bytes([0xC0, 0xBF, 0, 0x3F, 0x40]))

# The ids of a row, and their weights in FP64.
Row = tuple[list[int], list[float]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer: layout of W_gate, whether the ids come from a table, and `Router`'s same_bits."""

    layout: str
    hashed: bool = False
    same_bits: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        return TOKENS_OF_SAME_BITS if self.same_bits else TOKENS

    def __str__(self) -> str:
        return f"{self.layout}{' hash' * self.hashed}{' same_bits' * self.same_bits}"


CASES = (
    *(Case(layout=layout, hashed=hashed) for layout in LAYOUTS for hashed in (False, True)),
    *(Case(layout=layout, same_bits=True) for layout in LAYOUTS),
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The memory of every case's tensors, and the results of their rows.

    x BF16 [MAX_TOKENS, K], W_gate BF16 by layout, e_bias FP32 [EXPERTS], table int32
    [VOCABULARY, TOP_K], token_ids int64 [MAX_TOKENS], logits FP32 [MAX_TOKENS, EXPERTS].
    expected: by `Case.hashed`.
    """

    x: bytes
    W_gate: Mapping[str, bytes]
    e_bias: bytes
    table: bytes
    token_ids: bytes
    logits: bytes
    expected: Mapping[bool, Sequence[Row]]


@cache
def make_inputs() -> Inputs:
    """Draw the inputs, the same on every machine, and compute the results."""
    # randbytes and random alone: other methods may draw otherwise in another version of Python. Of
    # the first 40 seeds this one has the keys farthest apart, 3e-5 if they are not equal.
    drawn = random.Random(38)
    values_of_w = bytes(byte % len(VALUES) for byte in range(256))
    by_expert = drawn.randbytes(EXPERTS * K).translate(values_of_w)
    by_k = [by_expert[k::K] for k in range(K)]
    rows = [_draw_row(drawn) for _ in range(DISTINCT_ROWS)]
    bias = [int(drawn.random() * 3) * 0.3125 for _ in range(EXPERTS)]
    table = [_draw_ids(drawn) for _ in range(VOCABULARY)]
    token_ids = [int(drawn.random() * VOCABULARY) for _ in range(MAX_TOKENS)]

    logits = [_logits(row, by_k) for row in rows]
    scores = {logit: _score(logit) for row in logits for logit in row}
    by_row = [[scores[logit] for logit in row] for row in logits]
    weighed = [_weighed(_chosen(row, bias), row) for row in by_row]
    of_row = [row % DISTINCT_ROWS for row in range(MAX_TOKENS)]
    return Inputs(
        x=_repeated([_bf16(row) for row in rows], of_row),
        W_gate={"kmajor": _bf16(by_expert), "emajor": _bf16(b"".join(by_k))},
        e_bias=array("f", bias).tobytes(),
        table=array("i", (expert for ids in table for expert in ids)).tobytes(),
        token_ids=array("q", token_ids).tobytes(),
        logits=_repeated([array("f", row).tobytes() for row in logits], of_row),
        expected={
            False: [weighed[row] for row in of_row],
            True: [
                _weighed(table[token], by_row[row])
                for token, row in zip(token_ids, of_row, strict=True)
            ],
        },
    )


def _repeated(distinct: Sequence[bytes], of_row: Iterable[int]) -> bytes:
    return b"".join(distinct[row] for row in of_row)


def _draw_row(drawn: random.Random) -> bytes:
    """Draw a row of x: the place of each element in VALUES."""
    places = (int(drawn.random() * len(VALUES) / DENSITY) for _ in range(K))
    return bytes(place if place < len(VALUES) else _ZERO for place in places)


def _draw_ids(drawn: random.Random) -> list[int]:
    """Draw a row of the table: distinct experts."""
    ids: dict[int, None] = {}
    while len(ids) < TOP_K:
        ids[int(drawn.random() * EXPERTS)] = None
    return list(ids)


def _bf16(places: bytes) -> bytes:
    """Return the BF16 elements whose places in VALUES are given."""
    elements = bytearray(2 * len(places))
    for byte, of_place in enumerate(_BF16_BYTES):
        elements[byte::2] = places.translate(of_place.ljust(256, b"\0"))
    return bytes(elements)


def _logits(row: bytes, by_k: Sequence[bytes]) -> list[int]:
    """Return a row's products with each expert, by its few elements that are not zero."""
    logits = [0] * EXPERTS
    for k, place in enumerate(row):
        if x := VALUES[place]:
            logits = [sum_ + x * (w - _ZERO) for sum_, w in zip(logits, by_k[k], strict=True)]
    return logits


def _score(logit: int) -> float:
    """Return sqrt(softplus(logit))."""
    return math.sqrt(max(logit, 0) + math.log1p(math.exp(-abs(logit))))


def _chosen(scores: Sequence[float], bias: Sequence[float]) -> list[int]:
    """Return the ids of the largest keys, the lower id first if keys are equal."""
    keys = [score + each for score, each in zip(scores, bias, strict=True)]
    return sorted(range(EXPERTS), key=lambda expert: -keys[expert])[:TOP_K]


def _weighed(ids: Iterable[int], scores: Sequence[float]) -> Row:
    ids = list(ids)
    # Not sum, which Python rounds otherwise from 3.12 on.
    total = math.fsum(scores[expert] for expert in ids) + EPSILON
    return ids, [scores[expert] / total * SCALE for expert in ids]
