"""The oracle itself, against cases worked out by hand and against numbers of Python's own math."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

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
    tempered,
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


@settings(max_examples=100, deadline=None)
@given(st.floats(min_value=-170, max_value=700))
def test_scores_against_decimal_arithmetic(x):
    getcontext().prec = 120
    exact = (Decimal(x).exp() + 1).ln().sqrt()
    got = router_scores(torch.tensor([[x]], dtype=torch.float64)).item()
    assert got == pytest.approx(float(exact), rel=1e-14)


@settings(max_examples=100, deadline=None)
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


# ------------------------------------------------------------------ the published gates, by hand


def published_scores(row):
    """sqrt(softplus(x)) as torch.nn.functional.softplus has it: the identity above 20."""
    return [math.sqrt(x if x > 20 else math.log1p(math.exp(x))) for x in row]


def published_weights(row, experts, scale):
    """What follows the choice in both of transformers' DeepSeek-V4 routers."""
    scores = [published_scores(row)[expert] for expert in experts]
    return [score / (sum(scores) + 1e-20) * scale for score in scores]


ROWS = [
    [0.5, -1.25, 3.0, 25.0, -30.0, 2.0, 0.0, 7.5],
    [-4.0, -3.0, -2.0, -1.0, -0.5, -0.25, -8.0, -16.0],
    [21.0, 20.5, 19.5, 1.0, 2.0, 3.0, 4.0, 5.0],
]


def test_published_topk_router():
    """The bias is added to the score and picks; the weight is the score alone, over the sum."""
    bias = [0.0, 4.0, -9.0, 0.0, 0.25, 0.0, 1.0, 0.0]
    chosen = [[3, 1, 7], [1, 6, 4], [0, 1, 2]]
    bias_of = [bias, bias, [0.0] * 8]
    for row, experts, used in zip(ROWS, chosen, bias_of, strict=True):
        keys = [s + b for s, b in zip(published_scores(row), used, strict=True)]
        assert sorted(range(8), key=lambda e: -keys[e])[:3] == experts
        weights, ids = select([row], bias=used, scale=1.5, top_k=3)
        assert ids.tolist() == [experts]
        assert weights.tolist()[0] == pytest.approx(published_weights(row, experts, 1.5), rel=1e-9)


def test_published_hash_router():
    """Ids are the token's row of the table, in its order; scores have no say in them."""
    table = torch.tensor([[4, 3, 0], [0, 1, 2], [7, 6, 5], [2, 7, 4]])
    tokens = torch.tensor([3, 0, 3])
    weights, ids = hashed(ROWS, table, tokens, scale=2.5)
    assert ids.tolist() == [[2, 7, 4], [4, 3, 0], [2, 7, 4]]
    for got, row, experts in zip(weights.tolist(), ROWS, ids.tolist(), strict=True):
        assert got == pytest.approx(published_weights(row, experts, 2.5), rel=1e-9)


# ------------------------------------------------------------------ options

DOUBLE = torch.float64


def hashed(logits, table, tokens, scale=1.0, **more):
    logits = torch.tensor(logits, dtype=DOUBLE)
    top_k = table.shape[1]
    return select_reference(logits, None, scale, top_k, tid2eid=table, input_ids=tokens, **more)


def options(logits, top_k=2, scale=1.0, bias=None, **more):
    logits = torch.tensor(logits, dtype=DOUBLE)
    bias = torch.zeros(logits.shape[1]) if bias is None else torch.tensor(bias)
    return select_reference(logits, bias, scale, top_k, **more)


def test_image_rows_select_with_their_own_bias():
    row = [1.0, 2.0, 3.0, 0.0]
    given = {"bias": [0.0, 8.0, 0.0, 0.0], "bias_vl": torch.tensor([8.0, 0.0, 0.0, 9.0])}
    mask = torch.tensor([False, True, False])
    weights, ids = options([row] * 3, image_mask=mask, **given)
    assert ids.tolist() == [[1, 2], [3, 0], [1, 2]]
    scores = published_scores(row)
    assert weights[1].tolist() == pytest.approx(
        [scores[3] / (scores[3] + scores[0]), scores[0] / (scores[3] + scores[0])]
    )
    assert options([row] * 3, **given)[1].tolist() == [[1, 2]] * 3


def test_image_rows_of_a_hash_layer_select_by_bias_and_the_rest_by_the_table():
    row = [1.0, 2.0, 3.0, 0.0]
    given = {"bias_vl": torch.tensor([8.0, 0.0, 0.0, 9.0])}
    table, tokens = torch.tensor([[0, 1], [2, 1]]), torch.tensor([1, 7, 7, 0])
    mask = torch.tensor([False, True, False, True])
    weights, ids = hashed([row] * 4, table, tokens, image_mask=mask, **given)
    # The token id 7 is outside the table, which matters to the row of text alone.
    assert ids.tolist() == [[2, 1], [3, 0], [-1, -1], [3, 0]]
    scores = published_scores(row)
    assert weights[1].tolist() == pytest.approx(
        [scores[3] / (scores[3] + scores[0]), scores[0] / (scores[3] + scores[0])]
    )
    assert torch.equal(
        hashed([row] * 4, table, tokens, **given)[1], hashed([row] * 4, table, tokens)[1]
    )


def test_gate_temperature_divides_the_logits():
    cold, warm = [[-6.0, 3.0, 1.0]], [[-4.0, 2.0, 2 / 3]]
    got, expected = options(cold, gate_temp=1.5, top_k=3), options(warm, top_k=3)
    assert torch.equal(got[1], expected[1])
    # The quotients are FP32: 2 / 3 has that rounding.
    torch.testing.assert_close(got[0], expected[0], rtol=1e-7, atol=0)
    assert tempered(torch.tensor([2.0], dtype=DOUBLE), 3.0).item() == float(
        torch.tensor(2.0) / torch.tensor(3.0)
    )
    assert tempered(torch.tensor([1e300, 1.0], dtype=DOUBLE), 1.0).tolist() == [1e300, 1.0]


def test_gate_temperature_comes_before_the_rules_of_nan_and_infinity():
    weights, ids = options([[3e38, INF, NAN, 1.0]], gate_temp=0.5, top_k=4)
    assert ids.tolist() == [[0, 1, 3, 2]]
    assert weights[0, 0] == weights[0, 1]
    assert weights.isfinite().all()


def test_padded_rows_hold_nothing_of_their_input():
    logits = [[1.0, 2.0], [NAN, INF], [NAN, NAN], [2.0, 1.0]]
    mask = torch.tensor([False, True, True, False])
    weights, ids = options(logits, padding_mask=mask, num_shared_slots=1)
    assert ids.tolist() == [[1, 0, 2], [-1, -1, -1], [-1, -1, -1], [0, 1, 2]]
    assert weights[1:3].tolist() == [[0.0] * 3] * 2
    assert weights[[0, 3]].isfinite().all()


@pytest.mark.parametrize(("count", "valid"), [(-1, 0), (0, 0), (2, 2), (4, 4), (9, 4)])
def test_rows_from_num_tokens_on_are_padding(count, valid):
    for shape in ((), (1,), (1, 1)):
        num_tokens = torch.full(shape, count, dtype=torch.int32)
        _, ids = options([[1.0, 2.0]] * 4, num_tokens=num_tokens)
        assert ids.tolist() == [[1, 0]] * valid + [[-1, -1]] * (4 - valid)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_outside_the_table_make_padded_rows(dtype):
    table = torch.tensor([[1, 0], [2, 1]])
    far = 2**40 if dtype is torch.int64 else 2**31 - 1
    tokens = torch.tensor([0, -1, 2, far, 1], dtype=dtype)
    weights, ids = hashed([[NAN, 2.0, 1.0]] * 5, table, tokens)
    assert ids.tolist() == [[1, 0], [-1, -1], [-1, -1], [-1, -1], [2, 1]]
    assert weights[1:4].tolist() == [[0.0, 0.0]] * 3
    # A NaN score counts nothing in the sum.
    assert weights[0].tolist() == [1.0, 0.0]


def test_replicas_take_turns_by_row():
    to_physical = torch.tensor([[10, 11, 12], [20, 21, 22]])
    count = torch.tensor([3, 1])
    _, ids = options(
        [[1.0, 2.0]] * 4, to_physical=to_physical, logical_count=count, num_shared_slots=2
    )
    assert ids.tolist() == [[20, 10, 2, 3], [20, 11, 2, 3], [20, 12, 2, 3], [20, 10, 2, 3]]


@pytest.mark.parametrize(("count", "used"), [(-3, 1), (0, 1), (2, 2), (99, 3)])
def test_counts_beyond_the_replicas_are_held_within(count, used):
    to_physical = torch.tensor([[10, 11, 12]])
    given = {"to_physical": to_physical, "logical_count": torch.tensor([count])}
    _, ids = options([[1.0]] * 7, top_k=1, **given)
    assert ids[:, 0].tolist() == [10 + row % used for row in range(7)]


def test_a_hash_layer_is_mapped_too():
    given = {"to_physical": torch.tensor([[7], [8], [9]]), "logical_count": torch.ones(3).int()}
    _, ids = hashed([[0.0] * 3] * 2, torch.tensor([[2, 0]]), torch.tensor([0, 1]), **given)
    assert ids.tolist() == [[9, 7], [-1, -1]]


def test_shared_slots_weigh_1_whatever_the_scale():
    weights, ids = options([[1.0, 2.0, 3.0]], scale=2.5, num_shared_slots=2)
    assert ids.tolist() == [[2, 1, 3, 4]]
    assert weights[0, 2:].tolist() == [1.0, 1.0]
    assert weights[0, :2].sum().item() == pytest.approx(2.5)


def test_shared_slots_have_a_weight_of_their_own():
    given = {"num_shared_slots": 2, "shared_weight": 0.4}
    padding = torch.tensor([False, True])
    weights, _ = options([[1.0, 2.0, 3.0]] * 2, scale=2.5, padding_mask=padding, **given)
    assert weights[:, 2:].tolist() == [[0.4, 0.4], [0.0, 0.0]]
    assert weights[0, :2].sum().item() == pytest.approx(2.5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_image_rows_are_told_by_their_token_ids(dtype):
    row, low, count = [1.0, 2.0, 3.0, 0.0], 7, 3
    given = {"bias": [0.0, 8.0, 0.0, 0.0], "bias_vl": torch.tensor([8.0, 0.0, 0.0, 9.0])}
    tokens = [6, 7, 8, 9, 10, -1]
    tokens += [2**32 + 7, 7 - 2**32, -(2**63), 2**63 - 1] if dtype is torch.int64 else [2**31 - 1]
    call = {"input_ids": torch.tensor(tokens, dtype=dtype)}
    _, ids = options([row] * len(tokens), first_image_id=low, num_image_ids=count, **given, **call)
    text, image = [1, 2], [3, 0]
    assert ids.tolist() == [image if token in range(low, low + count) else text for token in tokens]
    # Beside a mask, either makes a row one of an image.
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    mask[0] = True
    both = {"first_image_id": low, "num_image_ids": count, "image_mask": mask}
    _, ids = options([row] * len(tokens), **both, **given, **call)
    assert ids[:2].tolist() == [image, image]
    assert ids[4].tolist() == text


def test_image_token_ids_outside_a_table_are_no_padding():
    row, table = [1.0, 2.0, 3.0, 0.0], torch.tensor([[0, 1], [2, 1]])
    given = {"bias_vl": torch.tensor([8.0, 0.0, 0.0, 9.0]), "first_image_id": 1}
    tokens = torch.tensor([0, 1, 2, 3])
    _, ids = hashed([row] * 4, table, tokens, num_image_ids=2, **given)
    assert ids.tolist() == [[0, 1], [3, 0], [3, 0], [-1, -1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_forced_rows_get_the_callers_ids_in_the_callers_order(dtype):
    row = [1.0, 2.0, 3.0, 0.0]
    forced = torch.tensor([[0, 3], [1, 0], [3, 2]], dtype=dtype)
    mask = torch.tensor([True, False, True])
    given = {"bias": [0.0, 0.0, 0.0, 9.0], "forced_ids": forced}
    weights, ids = options([row] * 3, scale=2.5, forced_mask=mask, **given)
    assert ids.tolist() == [[0, 3], [3, 2], [3, 2]]
    for got, experts in zip(weights.tolist(), ids.tolist(), strict=True):
        assert got == pytest.approx(published_weights(row, experts, 2.5))
    assert options([row] * 3, **given)[1].tolist() == forced.tolist()


@pytest.mark.parametrize("wrong", [[0, 0], [-1, 0], [0, 4], [2, 2**31 - 1], [2**32, 1]])
def test_forced_ids_that_are_no_choice_pad_their_row(wrong):
    dtype = torch.int64 if max(wrong) > 2**31 else torch.int32
    forced = torch.tensor([[1, 0], wrong, wrong], dtype=dtype)
    mask = torch.tensor([True, True, False])
    weights, ids = options(
        [[1.0, 2.0, 3.0, 0.0]] * 3, forced_ids=forced, forced_mask=mask, num_shared_slots=1
    )
    assert ids.tolist() == [[1, 0, 4], [-1, -1, -1], [2, 1, 4]]
    assert weights[1].tolist() == [0.0] * 3


def test_an_id_twice_pads_a_forced_row_wherever_it_stands():
    forced = torch.tensor([[2, 1, 2], [1, 1, 2], [0, 2, 2], [2, 1, 0]])
    _, ids = options([[1.0, 2.0, 3.0, 0.0]] * 4, top_k=3, forced_ids=forced)
    assert ids.tolist() == [[-1] * 3] * 3 + [[2, 1, 0]]


def test_a_forced_row_uses_no_token_id_and_padding_wins_over_it():
    table, tokens = torch.tensor([[0, 1]]), torch.tensor([9, 9, 0, 0])
    forced = torch.tensor([[2, 0]] * 4)
    mask = torch.tensor([True, False, True, True])
    padding = torch.tensor([False, False, True, False])
    given = {"to_physical": torch.tensor([[7], [8], [9]]), "logical_count": torch.ones(3).long()}
    _, ids = hashed(
        [[NAN, 1.0, 2.0]] * 4,
        table,
        tokens,
        forced_ids=forced,
        forced_mask=mask,
        padding_mask=padding,
        num_tokens=torch.tensor(3),
        **given,
    )
    assert ids.tolist() == [[9, 7], [-1, -1], [-1, -1], [-1, -1]]


def test_an_int64_map_counts_by_its_low_word():
    to_physical = torch.tensor([[10 + 2**32, 11 - 2**33, 12]])
    count = torch.tensor([2 + 2**40])
    _, ids = options([[1.0]] * 3, top_k=1, to_physical=to_physical, logical_count=count)
    assert ids[:, 0].tolist() == [10, 11, 10]


def test_without_norm_weights_are_scaled_scores():
    row = [1.0, 2.0, 3.0]
    weights, _ = options([row], scale=2.5, norm_topk_prob=False)
    scores = published_scores(row)
    assert weights[0].tolist() == pytest.approx([2.5 * scores[2], 2.5 * scores[1]], rel=1e-14)


def test_ids_in_either_width():
    for dtype in (torch.int32, torch.int64):
        assert options([[1.0, 2.0]], ids_dtype=dtype)[1].dtype is dtype


def test_neither_a_bias_nor_a_table():
    with pytest.raises(ValueError, match="expected e_bias, or tid2eid and input_ids"):
        select_reference(torch.zeros(1, 2), None, 1.0, 1)


def ids_by_hand(row, token, *, e_bias, bias_vl, table, image, first, count, forced, padded):
    """Return one row's ids, in plain Python; None if it is padding or treated like it."""
    if padded:
        return None
    if forced is not None:
        proper = len(set(forced)) == len(forced) and set(forced) <= set(range(len(row)))
        return forced if proper else None
    image = image or (token is not None and token in range(first, first + count))
    if table is not None and not image:
        return table[token] if token in range(len(table)) else None
    bias = bias_vl if image else e_bias
    keys = [score + each for score, each in zip(published_scores(row), bias, strict=True)]
    top_k = len(table[0]) if table is not None else 2
    return sorted(range(len(row)), key=lambda expert: (-keys[expert], expert))[:top_k]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_image_rows_forced_rows_and_padding_by_hand(data):
    """Any mix of the ways to come by a row's ids."""
    rows, e, scale = data.draw(st.integers(0, 6)), 5, 1.5
    flags = st.lists(st.booleans(), min_size=rows, max_size=rows)
    pair = st.tuples(st.integers(-1, e), st.integers(-1, e)).map(list)
    logits = [data.draw(st.permutations([-2.0, -1.0, 0.0, 1.5, 3.0])) for _ in range(rows)]
    images, masked, padded = (data.draw(flags) for _ in range(3))
    tokens = [data.draw(st.integers(-1, 4)) for _ in range(rows)]
    chosen = [data.draw(pair) for _ in range(rows)]
    first, count = data.draw(st.integers(-2, 4)), data.draw(st.integers(0, 3))
    hashed, forcing, all_rows = (data.draw(st.booleans()) for _ in range(3))
    table = [[4, 0], [1, 3], [2, 4]] if hashed else None
    e_bias, bias_vl = [0.0, 0.5, 1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.25]
    given: dict = {
        "bias_vl": torch.tensor(bias_vl),
        "image_mask": torch.tensor(images, dtype=torch.bool),
        "padding_mask": torch.tensor(padded, dtype=torch.bool),
        "input_ids": torch.tensor(tokens, dtype=torch.int64),
        "first_image_id": first,
        "num_image_ids": count,
    }
    if hashed:
        given["tid2eid"] = torch.tensor(table)
    if forcing:
        given["forced_ids"] = torch.tensor(chosen, dtype=torch.int64).reshape(rows, 2)
    if forcing and not all_rows:
        given["forced_mask"] = torch.tensor(masked, dtype=torch.bool)
    bias = None if hashed else torch.tensor(e_bias)
    tensor = torch.tensor(logits, dtype=DOUBLE).reshape(rows, e)
    weights, ids = select_reference(tensor, bias, scale, 2, **given)
    for at, row in enumerate(logits):
        expected = ids_by_hand(
            row,
            tokens[at],
            e_bias=e_bias,
            bias_vl=bias_vl,
            table=table,
            image=images[at],
            first=first,
            count=count,
            forced=chosen[at] if forcing and (all_rows or masked[at]) else None,
            padded=padded[at],
        )
        assert ids[at].tolist() == ([-1, -1] if expected is None else expected)
        of_row = [0.0, 0.0] if expected is None else published_weights(row, expected, scale)
        assert weights[at].tolist() == pytest.approx(of_row)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_options_hold_what_is_promised(data):
    """Distinct ids in range, weights that sum to the scale, padding that hides its row."""
    rows, e, shared = (data.draw(st.integers(*ends)) for ends in ((0, 6), (1, 12), (0, 3)))
    top_k = data.draw(st.integers(1, min(e, 8)))
    odd = st.sampled_from([NAN, INF, -INF, 1e30])
    number = st.one_of(st.integers(-20, 20).map(float), odd)
    logits = torch.tensor(
        data.draw(st.lists(st.lists(number, min_size=e, max_size=e), min_size=rows, max_size=rows)),
        dtype=DOUBLE,
    ).reshape(rows, e)
    flags = st.lists(st.booleans(), min_size=rows, max_size=rows).map(
        lambda values: torch.tensor(values, dtype=torch.bool)
    )
    padding = data.draw(flags)
    valid = torch.tensor(data.draw(st.integers(-1, 7)), dtype=torch.int32)
    given: dict = {"padding_mask": padding, "num_tokens": valid, "num_shared_slots": shared}
    given["gate_temp"] = data.draw(st.sampled_from([1.0, 0.5, 3.0]))
    bias: torch.Tensor | None = torch.linspace(0, 8, e)
    if data.draw(st.booleans()):
        orders = [data.draw(st.permutations(range(e)))[:top_k] for _ in range(3)]
        tokens = data.draw(st.lists(st.integers(-1, 3), min_size=rows, max_size=rows))
        given |= {"tid2eid": torch.tensor(orders), "input_ids": torch.tensor(tokens).long()}
        images = data.draw(flags)
        if data.draw(st.booleans()):
            given |= {"bias_vl": -torch.linspace(0, 8, e), "image_mask": images}
        else:
            images = torch.zeros_like(images)
        outside = torch.tensor([token not in range(3) for token in tokens]).bool()
        padding = padding | outside & ~images
        bias = None
    elif data.draw(st.booleans()):
        given |= {"bias_vl": -torch.linspace(0, 8, e), "image_mask": data.draw(flags)}

    weights, ids = select_reference(logits, bias, 1.5, top_k, **given)
    assert ids.shape == weights.shape == (rows, top_k + shared)
    for row in range(rows):
        padded = bool(padding[row]) or row >= valid
        routed, slots = ids[row, :top_k].tolist(), ids[row, top_k:].tolist()
        if padded:
            assert set(routed + slots) == {-1}
            assert not weights[row].any()
            continue
        assert len(set(routed)) == top_k
        assert set(routed) <= set(range(e))
        assert slots == [e + slot for slot in range(shared)]
        total = weights[row, :top_k].sum().item()
        # 0 where every chosen score vanishes.
        assert total == pytest.approx(1.5) or total < 1.5
        assert weights[row].isfinite().all()
        assert weights[row, top_k:].eq(1).all()

    replaced = logits.clone()
    hidden = torch.tensor([bool(padding[row]) or row >= valid for row in range(rows)]).bool()
    replaced[hidden] = NAN
    again = select_reference(replaced, bias, 1.5, top_k, **given)
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], ids)
