"""The exact oracle on a CPU: against rational arithmetic, itself in a batch, and the oracle."""

from __future__ import annotations

import json
import math
import struct
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import torch
from gpu_calls import laid_out
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_router_runtime.exact import (
    exact_logits,
    exact_reference,
    exact_scores,
    exact_selection,
    fused,
    fused_sum,
)
from dsv4_router_runtime.reference import router_scores, select_reference

BF16, NAN, INF = torch.bfloat16, math.nan, math.inf


@pytest.fixture
def random(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ the contract, in fractions


def parts(value: float) -> tuple[Fraction, int]:
    """A number of FP32's range as (significand, exponent)."""
    exponent = max(math.frexp(value)[1] - 1, -126)
    return Fraction(value) / Fraction(2) ** exponent, exponent


def toward_zero(value: Fraction) -> float:
    """The FP32 number next to an exact one, toward zero; infinity from 2^128 on."""
    if abs(value) >= 2**128:
        return math.copysign(INF, value)
    # The denominator is a power of two.
    exponent = max(abs(value.numerator).bit_length() - value.denominator.bit_length(), -126)
    unit = Fraction(2) ** (exponent - 23)
    return float(math.trunc(value / unit) * unit)


def to_nearest(value: Fraction | float) -> float:
    """FP32, ties to even, of an exact number that FP64 holds or rounds harmlessly."""
    return struct.unpack("f", struct.pack("f", float(value)))[0]


def step(accumulator: float, factors: list[tuple[float, float]]) -> float:
    """One MMA step by its definition."""
    terms = [parts(accumulator)]
    for a, b in factors:
        (a_part, a_exponent), (b_part, b_exponent) = parts(a), parts(b)
        terms.append((a_part * b_part, a_exponent + b_exponent))
    largest = max((exponent for part, exponent in terms if part), default=-133)
    unit = max(largest, -133) - 25
    kept = (math.trunc(part * Fraction(2) ** (exponent - unit)) for part, exponent in terms)
    return toward_zero(sum(kept) * Fraction(2) ** unit)


def logit(x: list[float], w: list[float]) -> float:
    """A whole logit by its definition, of finite factors."""
    blocks = len(x) // 64
    sums = []
    for index in range(16):
        accumulator = 0.0
        for k in range(64 * (index * blocks // 16), 64 * ((index + 1) * blocks // 16), 16):
            accumulator = step(accumulator, list(zip(x[k : k + 16], w[k : k + 16], strict=True)))
        sums.append(accumulator)
    return added([added(sums[first : first + 4]) for first in range(0, 16, 4)])


def added(terms: list[float]) -> float:
    """The FP32 sum of FP32 numbers, from left to right."""
    total = terms[0]
    for each in terms[1:]:
        # FP64 has the bits to round a sum of two FP32 numbers twice without harm.
        total = to_nearest(total + each)
    return total


def words(values: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08x}" for word in values.flatten().view(torch.int32).tolist()]


def bfloat16s(low: int, high: int) -> st.SearchStrategy:
    """Finite BF16 numbers with exponent fields low..high, zeros and denormals for field 0."""
    return st.builds(
        lambda sign, field, rest: (sign << 15 | field << 7 | rest) - (sign << 16),
        st.integers(0, 1),
        st.integers(low, high),
        st.integers(0, 127),
    )


def of_bits(bits, dtype=BF16) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int16 if dtype is BF16 else torch.int32).view(dtype)


# Near 1, near the ends of the range, and zeros among them.
FACTORS = st.one_of(bfloat16s(110, 140), bfloat16s(0, 254), bfloat16s(0, 3), st.just(0))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    factors=st.lists(st.tuples(FACTORS, FACTORS), min_size=16, max_size=16),
    accumulator=st.one_of(
        st.integers(-(2**31), 2**31 - 1).filter(lambda bits: bits >> 23 & 255 != 255),
        st.sampled_from([0, 1, 0x7F7FFFFF, 0x3F800001]),
    ),
)
def test_a_step_is_the_truncated_sum_that_the_contract_defines(factors, accumulator):
    a, b = (of_bits(bits) for bits in zip(*factors, strict=True))
    exponents = [
        ((each.view(torch.int16) >> 7 & 0xFF).clamp(min=1) - 127).to(torch.int16) for each in (a, b)
    ]
    before = of_bits([accumulator], torch.float32)
    after = fused_sum(before, (a.double() * b.double())[None], sum(exponents)[None])
    expected = step(before.item(), list(zip(a.tolist(), b.tolist(), strict=True)))
    assert words(after) == words(torch.tensor([expected]) + 0.0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    factors=st.sampled_from([bfloat16s(100, 150), bfloat16s(0, 0)]).flatmap(
        lambda ordinary: st.lists(
            st.tuples(
                st.one_of(ordinary, bfloat16s(0, 3), st.just(0)),
                st.one_of(bfloat16s(100, 180), bfloat16s(0, 3), st.just(0)),
            ),
            min_size=64,
            max_size=64,
        )
    )
)
def test_a_logit_of_zeros_denormals_and_large_factors(factors):
    x, w = (of_bits(bits) for bits in zip(*factors, strict=True))
    expected = torch.tensor([logit(x.tolist(), w.tolist())]) + 0.0
    assert words(exact_logits(x[None], w[:, None])) == words(expected)


def test_a_step_keeps_25_bits_and_no_more():
    """Beside 1, a term of 2^-25 counts and one of 2^-26 does not; the sum keeps 24 bits."""
    one = torch.tensor([1.0])
    for power, count, expected in (
        *((24, 2, 1 + 2**-23), (25, 4, 1 + 2**-23), (26, 8, 1.0)),
        (25, 3, 1.0),
    ):
        x = torch.zeros(16, dtype=BF16)
        x[:count] = 2.0**-power
        products = x.double()[None]
        exponents = torch.full((1, 16), -power, dtype=torch.int16)
        assert fused_sum(one, products, exponents).item() == expected


def test_a_products_exponent_is_not_normalised():
    """1.5 * 1.5 = 2.25 has exponent 0, so a term of 2^-25 beside it is not lost."""
    x, w = torch.zeros(1, 64, dtype=BF16), torch.zeros(64, 1, dtype=BF16)
    x[0, :3], w[:3, 0] = torch.tensor([1.5, 1.5, 2.0**-25]), torch.tensor([1.5, -1.5, 1.0])
    assert exact_logits(x, w).item() == 2.0**-25
    x[0, 2] = 2.0**-26
    assert exact_logits(x, w).item() == 0


KINDS = ("gaussian", "wide", "cancelling")


def drawn(random, kind: str, num_tokens: int, k: int, num_experts: int):
    """hidden_states and W_gate: gaussian, over 24 binades, or whose sums cancel."""
    x = torch.randn(num_tokens, k, generator=random)
    w = torch.randn(k, num_experts, generator=random)
    if kind == "wide":
        x *= torch.exp2(torch.randint(-12, 13, x.shape, generator=random))
        w *= torch.exp2(torch.randint(-12, 13, w.shape, generator=random))
    if kind == "cancelling":
        x[:, 1::2], w[1::2] = x[:, ::2], -w[::2]
        w[1::32] *= 1 + 2**-7
    return x.to(BF16), w.to(BF16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [64, 960, 1088])
def test_logits_are_those_of_the_contract(random, k, kind):
    """K of fewer blocks than slices, and of one more: slices of none, one and two blocks."""
    x, w = drawn(random, kind, 2, k, 2)
    columns = w.t().tolist()
    expected = [[logit(row, column) for column in columns] for row in x.tolist()]
    assert words(exact_logits(x, w)) == words(torch.tensor(expected) + 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_depends_on_its_row_and_column_alone(random, kind):
    x, w = drawn(random, kind, 70, 320, 40)
    logits = exact_logits(x, w)
    rows, experts = torch.randperm(70, generator=random), torch.randperm(40, generator=random)
    assert torch.equal(exact_logits(x[rows], w[:, experts]), logits[rows][:, experts])
    assert torch.equal(exact_logits(x[5:6], w[:, 7:8]), logits[5:6, 7:8])
    wide = torch.full((70, 400), NAN, dtype=BF16)
    wide[:, 8:328] = x
    for layout in ("kmajor", "emajor"):
        assert torch.equal(exact_logits(wide[:, 8:328], laid_out(w, layout)), logits)
    x[1::2], w[:, 1::2] = NAN, INF
    assert torch.equal(exact_logits(x, w)[::2, ::2], logits[::2, ::2])


def test_integers_are_exact_and_no_rows_are_none(random):
    x = torch.randint(-2, 3, (5, 1024), generator=random).to(BF16)
    w = torch.randint(-2, 3, (1024, 9), generator=random).to(BF16)
    assert torch.equal(exact_logits(x, w).double(), x.double() @ w.double())
    assert exact_logits(x[:0], w).shape == (0, 9)


def test_nan_infinity_and_overflow():
    x, w = torch.zeros(6, 64, dtype=BF16), torch.zeros(64, 1, dtype=BF16)
    w[:3, 0] = torch.tensor([1.0, 1.0, 0.0])
    x[:, :3] = torch.tensor(
        [[INF, 1, 1], [-INF, 1, 1], [INF, -INF, 1], [1, NAN, 1], [1, 1, INF], [3e38, 3e38, 0]]
    )
    expected = ["7f800000", "ff800000", "7fffffff", "7fffffff", "7fffffff", "7f800000"]
    assert words(exact_logits(x, w)) == expected


@pytest.mark.parametrize(
    ("x", "w", "error", "message"),
    [
        ((3, 64), (128, 4), ValueError, r"with K a multiple of 64 \(got \(3, 64\) and \(128, 4\)"),
        ((3, 96), (96, 4), ValueError, "K a multiple of 64"),
        ((3, 0), (0, 4), ValueError, "K a multiple of 64"),
        ((64,), (64, 4), ValueError, r"hidden_states: expected two dimensions \(got shape \(64,\)"),
        ((3, 64), (64, 4), TypeError, r"W_gate: expected torch.bfloat16.*got torch.float32"),
    ],
)
def test_what_is_refused(x, w, error, message):
    with pytest.raises(error, match=message):
        exact_logits(
            torch.zeros(x, dtype=BF16),
            torch.zeros(w, dtype=torch.float32 if error is TypeError else BF16),
        )


def test_selection_takes_fp32_logits_alone():
    with pytest.raises(TypeError, match=r"logits: expected torch.float32.*got torch.float64"):
        exact_selection(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(4), 1.0, 2)


# ------------------------------------------------------------------ from a logit to a weight

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(a=FLOATS, b=FLOATS, c=FLOATS, near=st.booleans())
def test_fused_rounds_once(a, b, c, near):
    if near:  # a sum that cancels, or is half an ulp off
        c = to_nearest(-a * b) if abs(a * b) < 3e38 else c
    a, b, c = (torch.tensor(value, dtype=torch.float32) for value in (a, b, c))
    exact = Fraction(a.item()) * Fraction(b.item()) + Fraction(c.item())
    below = toward_zero(exact)
    if abs(below) >= 2.0**127:
        return  # beyond or at the edge of FP32: infinity is as right as its neighbour
    bits = torch.tensor(below).view(torch.int32)
    above = (bits + 1).view(torch.float32).item()
    if exact < 0:
        above = -abs(above) if below == 0 else above
    gaps = abs(exact - Fraction(below)), abs(Fraction(above) - exact)
    even = bits.item() & 1 == 0
    expected = below if gaps[0] < gaps[1] or (gaps[0] == gaps[1] and even) else above
    assert fused(a, b, c).item() == expected


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("c", "up"), [(2.0**-80, 1), (0.0, 0), (-(2.0**-80), 0)])
def test_fused_sees_past_fp64_beside_a_tie(c, up, sign):
    """(1 + 2^-12)^2 = 1 + 2^-11 + 2^-24 is a tie of FP32; FP64 loses 2^-80 beside it."""
    a = torch.tensor(1 + 2**-12)
    assert fused(sign * a, a, sign * c).item() == sign * (1 + 2**-11 + up * 2**-23)


def test_scores_are_the_oracles_to_seven_digits():
    finite = torch.cat([torch.linspace(-170, 200, 40001), torch.tensor([0.0, -0.0, 1e30, 3e38])])
    expected = router_scores(finite.double())
    assert ((exact_scores(finite) - expected) / expected).abs().max() < 4e-7
    odd = torch.tensor([NAN, INF, -INF, 3.4028234663852886e38])
    scores = exact_scores(odd).tolist()
    assert math.isnan(scores[0])
    assert scores[1] == scores[3] == to_nearest(math.sqrt(3.4028234663852886e38))
    assert scores[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_weights_and_ids_agree_with_the_oracle_under_options(random, norm_topk_prob):
    x, w = drawn(random, "gaussian", 64, 1024, 48)
    logits = exact_logits(x, w / 16)
    options = {
        "gate_temp": 1.7,
        "norm_topk_prob": norm_topk_prob,
        "bias_vl": torch.randn(48, generator=random),
        "image_mask": torch.rand(64, generator=random) < 0.5,
        "padding_mask": torch.rand(64, generator=random) < 0.2,
        "num_shared_slots": 2,
        "shared_weight": 0.4,
    }
    bias = torch.randn(48, generator=random)
    weights, ids = exact_selection(logits, bias, 2.5, 6, **options)
    expected_weights, expected_ids = select_reference(logits.double(), bias, 2.5, 6, **options)
    assert weights.dtype is torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-6, atol=0)
    again = exact_reference(x, w / 16, bias, 2.5, 6, **options)
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], ids)


def test_a_total_is_summed_in_rank_order():
    """1, then seven scores below half an ulp of it: in any other order they would count."""
    tiny = torch.tensor(-33.5)
    assert exact_scores(tiny) < 2**-24
    one = torch.tensor(math.log(math.expm1(1)))
    logits = torch.stack([one, *[tiny] * 7])[None]
    weights, ids = exact_selection(logits, torch.zeros(8), 1.0, 8)
    assert ids.tolist() == [list(range(8))]
    assert weights[0, 0].item() == 1


def test_nan_logits_rank_last_and_weigh_nothing():
    logits = torch.tensor([[NAN, -3.0, INF, -INF]])
    weights, ids = exact_selection(logits, torch.zeros(4), 1.0, 4)
    assert ids.tolist() == [[2, 1, 3, 0]]
    assert weights[0, 2:].tolist() == [0, 0]
    assert weights.isfinite().all()


def test_logits_that_an_h200_gave():
    """Of one block of K: zeros beside huge factors, sums near the least FP32 number, raw bits."""
    recorded = json.loads((Path(__file__).parent / "h200_logits.json").read_text())
    assert len(recorded) == 12
    for case in recorded:
        x, w = (of_words(case[name]) for name in ("x", "w"))
        assert words(exact_logits(x[None], w[:, None])[0]) == [case["logit"]], case["draw"]


def of_words(text: str) -> torch.Tensor:
    """BF16 numbers from four hexadecimal digits each."""
    bits = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    return of_bits([bit - 2**16 if bit >= 2**15 else bit for bit in bits])
