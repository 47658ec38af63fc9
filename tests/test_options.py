"""Options of a layer and of a call: each that makes no sense is refused, and says what does."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_router_runtime.call import (
    NO_OPTIONS,
    Call,
    CallOptions,
    check_call,
    check_call_options,
)
from dsv4_router_runtime.layer import Layer, check_layer, complete_options, options_on
from dsv4_router_runtime.tables import check_physical_map, copied_hash_table

K, E, TOP_K, N, VOCAB = 128, 16, 4, 3, 10


def ints(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


def table(vocab=VOCAB, top_k=TOP_K, dtype=torch.int32):
    return (torch.arange(vocab * top_k).view(vocab, top_k) % E).to(dtype)


def layer(e_bias=None, layout="kmajor", **options) -> Layer:
    W = torch.zeros(E, K, dtype=torch.bfloat16).t()
    W = W if layout == "kmajor" else W.contiguous()
    if e_bias is None and options.get("tid2eid") is None:
        e_bias = torch.zeros(E)
    return check_layer(
        W, e_bias, top_k=TOP_K, routed_scaling_factor=2.5, options=complete_options(options)
    )


# ------------------------------------------------------------------ what a layer binds


def test_what_a_layers_options_settle_for_its_calls():
    plain = layer()
    assert (plain.columns, plain.hashed, plain.has_bias_vl) == (TOP_K, False, False)
    assert layer(num_shared_slots=2).columns == TOP_K + 2
    assert layer(bias_vl=torch.zeros(E)).has_bias_vl
    assert layer(tid2eid=table()).hashed


@pytest.mark.parametrize(
    "right",
    [
        {"gate_temp": 2},
        {"gate_temp": 1e-37},
        {"gate_temp": 3.4e38},
        {"num_shared_slots": 8},
        {"norm_topk_prob": False},
        {"tid2eid": table(dtype=torch.int64)},
        {"tid2eid": table(TOP_K, VOCAB).t()},
        {"tid2eid": table(1)},
        {"tid2eid": table(), "layout": "emajor"},
        {"tid2eid": table(), "bias_vl": torch.zeros(E)},
        {"tid2eid": table(), "to_physical": ints(E, 2), "logical_count": ints(E)},
        {"to_physical": ints(E, 1), "logical_count": ints(E), "num_shared_slots": 1},
    ],
)
def test_right_layers(right):
    layer(**right)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"e_bias": torch.zeros(E), "tid2eid": table()},
            ValueError,
            "e_bias: expected None beside tid2eid, whose ids need no bias (got a bias)",
        ),
        ({"bias_vl": 1.0}, TypeError, "bias_vl: expected a torch.Tensor (got float)"),
        ({"bias_vl": torch.zeros(E).double()}, TypeError, "bias_vl: expected dtype torch.float32"),
        (
            {"bias_vl": torch.zeros(E + 1)},
            ValueError,
            "bias_vl: expected shape [16], one for each expert (got shape [17])",
        ),
        ({"bias_vl": torch.zeros(2 * E)[::2]}, ValueError, "bias_vl: expected unit stride (call"),
        ({"bias_vl": torch.zeros(E).to("meta")}, ValueError, "bias_vl: expected device cpu, where"),
        (
            {"gate_temp": 0.0},
            ValueError,
            "gate_temp: expected a finite number in FP32's range, 1.1",
        ),
        ({"gate_temp": -1}, ValueError, "range, 1.17549435e-38..3.40282347e+38 (got -1)"),
        ({"gate_temp": 1e-46}, ValueError, "gate_temp: expected a finite number in FP32's range"),
        ({"gate_temp": float("nan")}, ValueError, "gate_temp: expected a finite number in FP32's"),
        ({"gate_temp": float("inf")}, ValueError, "gate_temp: expected a finite number in FP32's"),
        ({"gate_temp": torch.ones(())}, TypeError, "gate_temp: expected a float (got Tensor); a"),
        ({"gate_temp": True}, TypeError, "gate_temp: expected a float (got bool)"),
        ({"gate_temp": None}, TypeError, "gate_temp: expected a float (got NoneType)"),
        ({"num_shared_slots": -1}, ValueError, "num_shared_slots: expected 0..8 (got -1)"),
        ({"num_shared_slots": 9}, ValueError, "num_shared_slots: expected 0..8 (got 9)"),
        ({"num_shared_slots": 1.0}, TypeError, "num_shared_slots: expected an int (got float)"),
        ({"num_shared_slots": True}, TypeError, "num_shared_slots: expected an int (got bool)"),
        ({"norm_topk_prob": 1}, TypeError, "norm_topk_prob: expected a bool (got int)"),
        ({"norm_topk_prob": None}, TypeError, "norm_topk_prob: expected a bool (got NoneType)"),
        ({"tid2eid": [[0]]}, TypeError, "tid2eid: expected a torch.Tensor (got list)"),
        (
            {"tid2eid": table(dtype=torch.int16)},
            TypeError,
            "tid2eid: expected dtype torch.int32 or torch.int64 (got torch.int16)",
        ),
        ({"tid2eid": ints(VOCAB)}, ValueError, "tid2eid: expected 2 dimensions (got shape [10])"),
        (
            {"tid2eid": table(top_k=TOP_K + 1)},
            ValueError,
            "tid2eid: expected shape [vocab, 4], top_k columns (got shape [10, 5])",
        ),
        ({"tid2eid": ints(0, TOP_K)}, ValueError, "tid2eid: expected at least one row, and fewer"),
        (
            {"tid2eid": ints(1, TOP_K).expand(2**29, TOP_K)},
            ValueError,
            "fewer than 2**31 elements (got shape [536870912, 4])",
        ),
        ({"tid2eid": table().to("meta")}, ValueError, "tid2eid: expected device cpu, where W_gate"),
        (
            {"to_physical": ints(E, 2)},
            TypeError,
            "logical_count: expected a torch.Tensor beside to_physical (got None); pass both or",
        ),
        (
            {"logical_count": ints(E)},
            TypeError,
            "to_physical: expected a torch.Tensor beside logical_count (got None); pass both or",
        ),
        (
            {"to_physical": ints(E, 2).long(), "logical_count": ints(E)},
            TypeError,
            "to_physical: expected dtype torch.int32 (got torch.int64)",
        ),
        (
            {"to_physical": ints(E, 0), "logical_count": ints(E)},
            ValueError,
            "to_physical: expected shape [16, max_replicas], at least 1 replica for each expert",
        ),
        (
            {"to_physical": ints(E - 1, 2), "logical_count": ints(E)},
            ValueError,
            "to_physical: expected shape [16, max_replicas], at least 1 replica for each expert",
        ),
        (
            {"to_physical": ints(2, E).t(), "logical_count": ints(E)},
            ValueError,
            "to_physical: expected a contiguous tensor, read in place (got shape [16, 2] with str",
        ),
        (
            {"to_physical": ints(E, 2), "logical_count": ints(E + 1)},
            ValueError,
            "logical_count: expected shape [16], one for each expert (got shape [17])",
        ),
        (
            {"to_physical": ints(E, 2), "logical_count": ints(2 * E)[::2]},
            ValueError,
            "logical_count: expected unit stride (call .contiguous())",
        ),
        (
            {"to_physical": ints(E, 2), "logical_count": ints(E).to("meta")},
            ValueError,
            "logical_count: expected device cpu, where W_gate is (got device meta)",
        ),
    ],
)
def test_wrong_layers(wrong, error, message):
    with pytest.raises(error) as caught:
        layer(**wrong)
    assert message in str(caught.value)


def test_a_layer_without_a_bias_is_a_hash_layer():
    W = torch.zeros(E, K, dtype=torch.bfloat16).t()
    with pytest.raises(TypeError) as caught:
        check_layer(W, None, top_k=TOP_K, routed_scaling_factor=2.5)
    assert str(caught.value) == (
        "e_bias: expected a torch.Tensor (got None); only a layer with tid2eid has no bias"
    )


def test_rows_of_a_hash_layer_are_stepped_by_an_int32():
    W = torch.zeros(E, K, dtype=torch.bfloat16).t().to("meta")
    W = W.as_strided((K, E), (1, 2**31))
    options = complete_options({"tid2eid": table().to("meta")})
    with pytest.raises(ValueError, match=r"W_gate: expected a stride along E below 2\*\*31"):
        check_layer(W, None, top_k=TOP_K, routed_scaling_factor=1, options=options)


def test_options_that_are_on_are_named():
    assert options_on({}) == options_on({"gate_temp": 1, "num_shared_slots": 0}) == ""
    both = {"to_physical": ints(E, 1), "logical_count": ints(E)}
    on = {"gate_temp": 1.5, "norm_topk_prob": False, "num_shared_slots": 2, **both}
    assert options_on(on) == (
        "gate_temp=1.5, to_physical, logical_count, num_shared_slots=2, norm_topk_prob=False"
    )


# ------------------------------------------------------------------ the values of tables


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_hash_table_is_copied_whatever_its_strides(dtype):
    given = table(dtype=dtype)
    for view in (given, given.t().contiguous().t(), given.repeat(1, 2)[:, :TOP_K]):
        copy = copied_hash_table(view, E)
        assert copy.dtype is torch.int32
        assert copy.is_contiguous()
        assert copy.data_ptr() != view.data_ptr()
        assert torch.equal(copy, given.int())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 1, 2, E], "tid2eid: expected ids in 0..15 (got 16 at [7, 3])"),
        ([0, -1, 2, 3], "tid2eid: expected ids in 0..15 (got -1 at [7, 1])"),
        ([0, 2**32, 2, 3], "tid2eid: expected ids in 0..15 (got 4294967296 at [7, 1])"),
        ([5, 1, 2, 5], "tid2eid: expected distinct ids in each row (got [5, 1, 2, 5] at [7])"),
    ],
)
def test_wrong_values_of_a_hash_table(row, message):
    wrong = table(dtype=torch.int64)
    wrong[7] = torch.tensor(row)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        copied_hash_table(wrong, E)
    assert str(caught.value) == message


def test_a_hash_table_from_inference_mode():
    with torch.inference_mode():
        given = table()
    assert not copied_hash_table(given, E).is_inference()


def physical(**changes):
    """Experts 0..15 on ids 20.., a second replica on ids 100.. of the even ones."""
    to_physical = torch.stack([torch.arange(E) + 20, torch.arange(E) + 100], 1).int()
    logical_count = torch.tensor([2, 1] * (E // 2)).int()
    for place, value in changes.get("to", {}).items():
        to_physical[place] = value
    for place, value in changes.get("count", {}).items():
        logical_count[place] = value
    return to_physical, logical_count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"to": {(1, 1): -1}},  # unused
        {"to": {(1, 1): E}},
        {"to": {(0, 1): 0}},
        {"to": {(0, 1): E - 1, (2, 1): E + 2}},
        {"count": {3: 2}},
    ],
)
def test_right_physical_maps(changes):
    check_physical_map(*physical(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": {3: 0}}, "logical_count: expected 1..2, to_physical's replicas (got 0 at [3])"),
        (
            {"count": {3: -5}},
            "logical_count: expected 1..2, to_physical's replicas (got -5 at [3])",
        ),
        ({"count": {9: 3}}, "logical_count: expected 1..2, to_physical's replicas (got 3 at [9])"),
        ({"to": {(4, 1): -1}}, "to_physical: expected ids of at least 0 (got -1 at [4, 1])"),
    ],
)
def test_wrong_values_of_a_physical_map(changes, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_physical_map(*physical(**changes))
    assert str(caught.value) == message


# ------------------------------------------------------------------ what a call brings


def outputs(n=N, columns=TOP_K, ids_dtype=torch.int32):
    return torch.zeros(n, columns), torch.zeros(n, columns, dtype=ids_dtype)


def call_of(facts, out_weights=None, out_ids=None, n=N) -> Call:
    weights, ids = outputs(n, facts.columns)
    weights = weights if out_weights is None else out_weights
    ids = ids if out_ids is None else out_ids
    return check_call(facts, torch.zeros(n, K, dtype=torch.bfloat16), weights, ids)


def options_of(facts, call=None, **given) -> CallOptions:
    names = ("image_mask", "padding_mask", "num_tokens", "input_ids")
    call = call_of(facts) if call is None else call
    return check_call_options(facts, call, *(given.get(name) for name in names))


def mask(n=N):
    return torch.zeros(n, dtype=torch.bool)


def test_right_calls():
    text, hashed, vl = layer(), layer(tid2eid=table()), layer(bias_vl=torch.zeros(E))
    both = layer(tid2eid=table(), bias_vl=torch.zeros(E))
    assert options_of(text) == NO_OPTIONS
    rows, count = mask(), ints(1)
    assert options_of(text, padding_mask=rows) == (0, rows.data_ptr(), 0, 0, 0)
    assert options_of(text, num_tokens=count) == (0, 0, count.data_ptr(), 0, 0)
    assert options_of(text, num_tokens=count[0]) == (0, 0, count.data_ptr(), 0, 0)
    images = mask()
    assert options_of(vl, image_mask=images, padding_mask=rows)[:2] == (
        images.data_ptr(),
        rows.data_ptr(),
    )
    for dtype, wide in ((torch.int32, 0), (torch.int64, 1)):
        tokens = torch.zeros(N, dtype=dtype)
        assert options_of(hashed, input_ids=tokens) == (0, 0, 0, tokens.data_ptr(), wide)
        assert options_of(both, input_ids=tokens, image_mask=images) == (
            *(images.data_ptr(), 0, 0),
            *(tokens.data_ptr(), wide),
        )


def test_one_row_has_no_stride_and_no_row_no_element():
    facts = layer()
    one = torch.zeros(9, dtype=torch.bool)[::3][:1]
    assert options_of(facts, call_of(facts, n=1), padding_mask=one)[1] == one.data_ptr()
    options_of(facts, call_of(facts, n=0), padding_mask=mask(0))


@pytest.mark.parametrize(
    ("options", "wrong", "error", "message"),
    [
        (
            {},
            {"image_mask": mask()},
            ValueError,
            "image_mask: expected None, since the layer has no bias_vl (got a mask)",
        ),
        (
            {},
            {"input_ids": ints(N)},
            ValueError,
            "input_ids: expected None, since the layer has no tid2eid (got token ids)",
        ),
        (
            {"tid2eid": table()},
            {},
            TypeError,
            "input_ids: expected a torch.Tensor of the 3 rows' token ids, which the layer's tid2e",
        ),
        (
            {"tid2eid": table(), "bias_vl": torch.zeros(E)},
            {"image_mask": mask()},
            TypeError,
            "input_ids: expected a torch.Tensor of the 3 rows' token ids, which the layer's tid2e",
        ),
        (
            {"tid2eid": table()},
            {"input_ids": [1, 2, 3]},
            TypeError,
            "input_ids: expected a torch.Tensor (got list)",
        ),
        (
            {"tid2eid": table()},
            {"input_ids": torch.zeros(N)},
            TypeError,
            "input_ids: expected dtype torch.int32 or torch.int64 (got torch.float32)",
        ),
        (
            {"tid2eid": table()},
            {"input_ids": ints(1, N)},
            ValueError,
            "input_ids: expected 1 dimension (got shape [1, 3])",
        ),
        (
            {"tid2eid": table()},
            {"input_ids": ints(N + 1)},
            ValueError,
            "input_ids: expected shape [3], one for each row of hidden_states (got shape [4])",
        ),
        (
            {"tid2eid": table()},
            {"input_ids": ints(N, 2).long()[:, 0]},
            ValueError,
            "input_ids: expected unit stride (call .contiguous()) (got shape [3] with strides (2,",
        ),
        (
            {"tid2eid": table()},
            {"input_ids": ints(N), "image_mask": mask()},
            ValueError,
            "image_mask: expected None, since the layer has no bias_vl (got a mask)",
        ),
        (
            {"bias_vl": torch.zeros(E)},
            {"image_mask": mask(N - 1)},
            ValueError,
            "image_mask: expected shape [3], one for each row of hidden_states (got shape [2])",
        ),
        ({}, {"padding_mask": True}, TypeError, "padding_mask: expected a torch.Tensor (got bool)"),
        (
            {},
            {"padding_mask": mask().int()},
            TypeError,
            "padding_mask: expected dtype torch.bool (got torch.int32)",
        ),
        (
            {},
            {"padding_mask": mask(N + 1)},
            ValueError,
            "padding_mask: expected shape [3], one for each row of hidden_states (got shape [4])",
        ),
        ({}, {"padding_mask": mask(2 * N)[::2]}, ValueError, "padding_mask: expected unit stride"),
        (
            {},
            {"padding_mask": mask().to("meta")},
            ValueError,
            "padding_mask: expected device cpu, where W_gate is (got device meta)",
        ),
        ({}, {"padding_mask": mask().to_sparse()}, ValueError, "padding_mask: expected a dense"),
        (
            {},
            {"num_tokens": 2},
            TypeError,
            "num_tokens: expected a torch.Tensor on the device (got int); a number that the host "
            "knows is hidden_states[:num_tokens]",
        ),
        ({}, {"num_tokens": 2.0}, TypeError, "num_tokens: expected a torch.Tensor (got float)"),
        (
            {},
            {"num_tokens": ints(1).long()},
            TypeError,
            "num_tokens: expected dtype torch.int32 (got torch.int64)",
        ),
        ({}, {"num_tokens": ints(2)}, ValueError, "num_tokens: expected one element (got shape [2"),
        ({}, {"num_tokens": ints(0)}, ValueError, "num_tokens: expected one element (got shape [0"),
        (
            {},
            {"num_tokens": ints(1).to("meta")},
            ValueError,
            "num_tokens: expected device cpu, where W_gate is (got device meta)",
        ),
    ],
)
def test_wrong_calls(options, wrong, error, message):
    with pytest.raises(error) as caught:
        options_of(layer(**options), **wrong)
    assert message in str(caught.value)


def test_what_a_call_reads_lies_apart_from_what_it_writes():
    hashed = layer(tid2eid=table(), num_shared_slots=1)
    for ids_dtype in (torch.int32, torch.int64):
        weights, ids = outputs(columns=hashed.columns, ids_dtype=ids_dtype)
        call = call_of(hashed, weights, ids)
        for name, out in (("out_weights", weights), ("out_ids", ids)):
            flat = out.view(torch.bool).view(-1)
            for at in (0, flat.numel() - N):
                with pytest.raises(
                    ValueError, match=f"padding_mask: expected memory apart .*{name}"
                ):
                    options_of(hashed, call, input_ids=ints(N), padding_mask=flat[at:][:N])
            words = out.view(torch.int32).view(-1)
            with pytest.raises(ValueError, match=f"num_tokens: expected memory apart from {name}"):
                options_of(hashed, call, input_ids=ints(N), num_tokens=words[-1])
            with pytest.raises(ValueError, match=f"input_ids: expected memory apart from {name}"):
                options_of(hashed, call, input_ids=words[-N:])


def test_what_follows_an_output_may_be_read():
    """One buffer: ids, and a mask right behind the last element that is written."""
    facts = layer()
    buffer = torch.zeros(N * 16 + 1, dtype=torch.int32)
    ids = buffer[: N * 16].view(N, 16)[:, :TOP_K]
    behind = buffer.view(torch.bool)[((N - 1) * 16 + TOP_K) * 4 :]
    call = call_of(facts, out_ids=ids)
    assert options_of(facts, call, padding_mask=behind[:N])[1] == behind.data_ptr()


# ------------------------------------------------------------------ outputs with options


def test_outputs_have_room_for_the_shared_slots():
    facts = layer(num_shared_slots=2)
    for ids_dtype in (torch.int32, torch.int64):
        weights, ids = outputs(columns=TOP_K + 2, ids_dtype=ids_dtype)
        assert call_of(facts, weights, ids)[-1] == (ids_dtype is torch.int64)
        for short in ({"out_weights": weights[:, 1:]}, {"out_ids": ids[:, 1:]}):
            with pytest.raises(ValueError, match=r"at least \[3, 6\] \(N, top_k \+ num_shared_slo"):
                call_of(facts, **({"out_weights": weights, "out_ids": ids} | short))
    with pytest.raises(ValueError, match=r"a row stride of at least top_k \+ num_shared_slots \(6"):
        call_of(facts, torch.zeros(99).as_strided((N, 6), (5, 1)), ids)


def bytes_of(out, columns):
    """Every byte that a call writes of an output."""
    size, stride = out.element_size(), out.stride(0)
    starts = (out.data_ptr() + (row * stride) * size for row in range(out.shape[0]))
    return {start + offset for start in starts for offset in range(columns * size)}


@settings(max_examples=500, deadline=None)
@given(
    rows=st.integers(0, 4),
    strides=st.tuples(st.integers(4, 20), st.integers(4, 12)),
    starts=st.tuples(st.integers(0, 24), st.integers(0, 16)),
    ids_dtype=st.sampled_from([torch.int32, torch.int64]),
    shared_slots=st.integers(0, 2),
    same_stride=st.booleans(),
)
def test_outputs_that_pass_share_no_byte(
    rows, strides, starts, ids_dtype, shared_slots, same_stride
):
    """Views of one buffer: either the exact bytes are apart, or the call is refused."""
    facts = layer(num_shared_slots=shared_slots)
    size = ids_dtype.itemsize
    w_stride, i_stride = max(strides[0], facts.columns), max(strides[1], facts.columns)
    if same_stride:
        w_stride = i_stride * size // 4
    buffer = torch.zeros(256, dtype=torch.int32)
    shape = (rows, facts.columns)
    weights = buffer.view(torch.float32)[starts[0] :].as_strided(shape, (w_stride, 1))
    ids = buffer.view(ids_dtype)[starts[1] :].as_strided(shape, (i_stride, 1))
    apart = not bytes_of(weights, facts.columns) & bytes_of(ids, facts.columns)
    with contextlib.suppress(ValueError):
        check_call(facts, torch.zeros(rows, K, dtype=torch.bfloat16), weights, ids)
        assert apart
        return
    # Rows of unlike strides may miss each other; that is not worked out.
    assert not apart or w_stride * 4 != i_stride * size
