"""The oracle itself, against cases worked out by hand and against numbers of Python's own math."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_router_runtime.reference import (
    ranking_margin,
    router_reference,
    router_scores,
    select_reference,
    selection_keys,
    selection_margin,
)

NAN, INF = math.nan, math.inf


def select(logits, bias=None, scale=1.0, top_k=2):
    logits = torch.tensor(logits, dtype=torch.float64)
    bias = torch.zeros(logits.shape[1]) if bias is None else torch.tensor(bias)
    return select_reference(logits, bias, scale, top_k)


def test_worked_example():
    """softplus(0) = ln 2; e**4 - 1 is where softplus is exactly 4, its root 2."""
    two = math.log(math.expm1(4))
    weights, ids = select([[0.0, two, -200.0, two]], scale=2.5, top_k=3)
    assert ids.tolist() == [[1, 3, 0]]
    total = 2 + 2 + math.sqrt(math.log(2))
    assert weights.tolist()[0] == pytest.approx(
        [5 / total, 5 / total, 2.5 * math.sqrt(math.log(2)) / total], rel=1e-14
    )


def test_matmul_and_layouts():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.bfloat16)
    W = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 4.0]], dtype=torch.bfloat16)
    bias = torch.zeros(3)
    expected = select([[2.0, 4.0, 7.0], [2.5, -2.0, -7.0]])
    for layout in (W, W.t().contiguous().t()):
        weights, ids = router_reference(x, layout, bias, 1.0, 2)
        assert ids.tolist() == expected[1].tolist() == [[2, 1], [0, 1]]
        torch.testing.assert_close(weights, expected[0], rtol=0, atol=0)
    assert router_reference(x, W, bias, 1.0, 2, dtype=torch.float32)[0].dtype is torch.float32
    assert router_reference(x[:0], W, bias, 1.0, 2)[1].shape == (0, 2)


def test_bias_steers_selection_only():
    weights, ids = select([[1.0, 2.0, 3.0]], bias=[8.0, 0.0, -8.0])
    assert ids.tolist() == [[0, 1]]
    plain = router_scores(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(weights, plain / plain.sum())


def test_ties_go_to_the_lower_index():
    assert select([[1.0] * 512], top_k=8)[1].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert select([[0.0, 5.0, 5.0, 0.0, 5.0]], top_k=4)[1].tolist() == [[1, 2, 4, 0]]


def test_nan_ranks_last_and_counts_nothing():
    weights, ids = select([[NAN, -3.0, NAN, -INF]], top_k=4)
    assert ids.tolist() == [[1, 3, 0, 2]]
    assert weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_nan_ranks_below_an_expert_that_its_bias_shuts_out():
    _, ids = select([[NAN, 1.0, 2.0]], bias=[0.0, -INF, 0.0], top_k=3)
    assert ids.tolist() == [[2, 1, 0]]


def test_all_nan_row():
    weights, ids = select([[NAN] * 8], top_k=6)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert weights.tolist() == [[0.0] * 6]


def test_infinity_is_the_largest_finite_score():
    weights, ids = select([[INF, 0.0, INF]], top_k=3)
    assert ids.tolist() == [[0, 2, 1]]
    assert weights[0, 0] == weights[0, 1] == 0.5
    assert 0 < weights[0, 2] < 1e-18
    beyond_fp32 = select([[1e300, 0.0, INF]], top_k=3)
    assert beyond_fp32[1].tolist() == [[0, 2, 1]]
    assert beyond_fp32[0][0, 0] == beyond_fp32[0][0, 1] == 0.5


def test_epsilon_when_every_score_vanishes():
    weights, _ = select([[-INF, -INF]])
    assert weights.tolist() == [[0.0, 0.0]]


@settings(max_examples=200, deadline=None)
@given(st.floats(min_value=-170, max_value=700))
def test_scores_against_decimal_arithmetic(x):
    getcontext().prec = 120
    exact = (Decimal(x).exp() + 1).ln().sqrt()
    got = router_scores(torch.tensor([[x]], dtype=torch.float64)).item()
    assert got == pytest.approx(float(exact), rel=1e-14)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda e: st.tuples(
            st.lists(st.integers(-4, 4), min_size=e, max_size=e),
            st.lists(st.sampled_from([0.0, 0.5, 8.0]), min_size=e, max_size=e),
            st.integers(1, min(e, 8)),
        )
    )
)
def test_order_against_sorted(case):
    """Python's own sort on (descending key, index) gives the same ids."""
    logits, bias, top_k = case
    tensor = torch.tensor([logits], dtype=torch.float64)
    keys = selection_keys(tensor, torch.tensor(bias))[0].tolist()
    expected = sorted(range(len(keys)), key=lambda e: (-keys[e], e))[:top_k]
    weights, ids = select_reference(tensor, torch.tensor(bias), 1.5, top_k)
    assert ids.tolist() == [expected]
    assert weights.sum().item() == pytest.approx(1.5, rel=1e-12)


def test_margins():
    root = router_scores(torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64))[0]
    logits = torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    bias = torch.zeros(3)
    clear = selection_margin(logits, bias, 1)
    assert clear.tolist() == pytest.approx([float(root[0] - root[1]), 0.0])
    assert selection_margin(logits, bias, 3).tolist() == [INF, INF]
    order = ranking_margin(logits, bias, 3)
    assert order.tolist() == pytest.approx([float((root[:-1] - root[1:]).min()), INF])
    assert ranking_margin(logits[:, :1], bias[:1], 1).tolist() == [INF, INF]
