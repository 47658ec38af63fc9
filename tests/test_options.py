"""Options of a layer and of a call: each that makes no sense is refused, and says what does."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_router_runtime.binding import _tensor_in
from dsv4_router_runtime.call import check_call, check_call_options, plainly_right
from dsv4_router_runtime.device.arguments import NO_OPTIONS, NO_RARE, Call, CallOptions
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
    by_id = layer(bias_vl=torch.zeros(E), num_image_ids=1)
    assert (by_id.hashed, by_id.has_image_ids, by_id.needs_input_ids) == (False, True, True)
    assert (plain.needs_input_ids, layer(tid2eid=table()).needs_input_ids) == (False, True)


@pytest.mark.parametrize(
    "right",
    [
        {"gate_temp": 2},
        {"gate_temp": 1e-37},
        {"gate_temp": 2.0**126},
        {"num_shared_slots": 8},
        {"norm_topk_prob": False},
        {"tid2eid": table(dtype=torch.int64)},
        {"tid2eid": table(TOP_K, VOCAB).t()},
        {"tid2eid": table(1)},
        {"tid2eid": table(), "layout": "emajor"},
        {"tid2eid": table(), "bias_vl": torch.zeros(E)},
        {"tid2eid": table(), "to_physical": ints(E, 2), "logical_count": ints(E)},
        {"to_physical": ints(E, 1), "logical_count": ints(E), "num_shared_slots": 1},
        {"to_physical": ints(E, 2).long(), "logical_count": ints(E).long()},
        {"shared_weight": 0},
        {"shared_weight": -1e38, "num_shared_slots": 2},
        {"bias_vl": torch.zeros(E), "num_image_ids": 5, "first_image_id": 2**31 - 5},
        {"bias_vl": torch.zeros(E), "num_image_ids": 2**31 - 1, "first_image_id": -(2**31)},
        {"bias_vl": torch.zeros(E), "num_image_ids": 1, "tid2eid": table()},
        {"first_image_id": 7},
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
        ({"gate_temp": -1}, ValueError, "range, 1.17549435e-38..8.50705917e+37 (got -1)"),
        # Its reciprocal in FP32 is 0, by which router_decode multiplies.
        ({"gate_temp": 2.0**127}, ValueError, "range, 1.17549435e-38..8.50705917e+37 (got 1.7014"),
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
            {"to_physical": ints(E, 2).short(), "logical_count": ints(E)},
            TypeError,
            "to_physical: expected dtype torch.int32 or torch.int64 (got torch.int16)",
        ),
        (
            {"to_physical": ints(E, 2).long(), "logical_count": ints(E)},
            TypeError,
            "logical_count: expected dtype torch.int64, to_physical's (got torch.int32); convert",
        ),
        (
            {"to_physical": ints(E, 2), "logical_count": ints(E).long()},
            TypeError,
            "logical_count: expected dtype torch.int32, to_physical's (got torch.int64); convert",
        ),
        ({"shared_weight": "1"}, TypeError, "shared_weight: expected a float (got str)"),
        (
            {"shared_weight": float("nan")},
            ValueError,
            "shared_weight: expected a finite number in FP32's range, -3.40282347e+38..3.4028234",
        ),
        ({"shared_weight": 3.5e38}, ValueError, "3.40282347e+38 (got 3.5e+38)"),
        ({"num_image_ids": 1.0}, TypeError, "num_image_ids: expected an int (got float)"),
        ({"num_image_ids": -1}, ValueError, "num_image_ids: expected 0..2147483647 (got -1)"),
        ({"first_image_id": None}, TypeError, "first_image_id: expected an int (got NoneType)"),
        (
            {"first_image_id": 2**31},
            ValueError,
            "first_image_id: expected -2147483648..2147483647 (got 2147483648)",
        ),
        (
            {"first_image_id": 2**31 - 4, "num_image_ids": 5, "bias_vl": torch.zeros(E)},
            ValueError,
            "num_image_ids: expected token ids that int32 holds, first_image_id + num_image_ids up "
            "to 2**31 (got 2147483644 + 5)",
        ),
        (
            {"num_image_ids": 5},
            ValueError,
            "num_image_ids: expected 0 without bias_vl, which image rows select with; pass both or "
            "neither (got 5)",
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


@pytest.mark.parametrize("name", ["out_weights", "out_ids"])
@pytest.mark.parametrize("stride", [TOP_K - 1, 2**31])
def test_rows_of_an_output_are_stepped_by_an_int32(name, stride):
    W = torch.zeros(E, K, dtype=torch.bfloat16, device="meta").t()
    bias = torch.zeros(E, device="meta")
    layer = check_layer(W, bias, top_k=TOP_K, routed_scaling_factor=1)
    given = {
        "hidden_states": torch.zeros(3, K, dtype=torch.bfloat16, device="meta"),
        "out_weights": torch.zeros(3, TOP_K, device="meta"),
        "out_ids": torch.zeros(3, TOP_K, dtype=torch.int32, device="meta"),
    }
    given[name] = given[name].as_strided((3, TOP_K), (stride, 1))
    expected = rf"^{name}: expected a row stride of at least top_k \({TOP_K}\) and below 2\*\*31"
    with pytest.raises(ValueError, match=expected):
        check_call(layer, **given)


@pytest.mark.parametrize("wide", [0, 1, None])
def test_the_check_of_the_usual_call_has_that_bound_too(wide):
    """On memory that is not there: only addresses and strides are read."""

    def rows(at: int, dtype: torch.dtype, stride: int) -> torch.Tensor:
        size = (2 * stride + TOP_K) * dtype.itemsize
        memory = SimpleNamespace(address=at << 44, size=size)
        whole = _tensor_in(memory, dtype, (size // dtype.itemsize,), torch.device("cpu"))
        return whole.as_strided((3, TOP_K), (stride, 1))

    W, bias = torch.zeros(E, K, dtype=torch.bfloat16).t(), torch.zeros(E)
    layer = check_layer(W, bias, top_k=TOP_K, routed_scaling_factor=1)
    strides = [2**31 - (at != wide) for at in (0, 1)]
    weights, ids = rows(1, torch.float32, strides[0]), rows(2, torch.int32, strides[1])
    got = plainly_right(layer, torch.zeros(3, K, dtype=torch.bfloat16), weights, ids)
    assert (got is None) == (wide is not None)


@pytest.mark.parametrize(("dtype", "most"), [(torch.int32, 2**31), (torch.int64, 2**30)])
def test_a_physical_map_is_indexed_by_an_int32(dtype, most):
    """router_decode counts 32-bit words: a map beyond would be read at a negative index."""
    W = torch.zeros(E, K, dtype=torch.bfloat16, device="meta").t()
    bias = torch.zeros(E, device="meta")

    def check(replicas: int) -> None:
        maps = {"to_physical": (E, replicas), "logical_count": (E,)}
        given = {name: torch.empty(of, dtype=dtype, device="meta") for name, of in maps.items()}
        options = complete_options(given)
        check_layer(W, bias, top_k=TOP_K, routed_scaling_factor=1, options=options)

    check(most // E - 1)
    with pytest.raises(ValueError, match=r"to_physical: .* and below 8 GiB"):
        check(most // E)


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
        ({"to": {(4, 1): -1}}, "to_physical: expected ids in 0..2147483647 (got -1 at [4, 1])"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wrong_values_of_a_physical_map(changes, message, dtype):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_physical_map(*(tensor.to(dtype) for tensor in physical(**changes)))
    assert str(caught.value) == message


def test_ids_of_a_physical_map_that_int32_does_not_hold():
    to_physical, logical_count = (tensor.long() for tensor in physical())
    to_physical[1, 1] = 2**40  # unused
    to_physical[0, 0] = 2**31 - 1
    check_physical_map(to_physical, logical_count)
    to_physical[4, 1] = 2**31
    with pytest.raises(ValueError, match=r"expected ids in 0\.\.2147483647 \(got 2147483648 at"):
        check_physical_map(to_physical, logical_count)


# ------------------------------------------------------------------ what a call brings


def outputs(n=N, columns=TOP_K, ids_dtype=torch.int32):
    return torch.zeros(n, columns), torch.zeros(n, columns, dtype=ids_dtype)


# A call's tensors live on, so that no other tensor of a test comes to lie there.
ROWS = torch.zeros(N, K, dtype=torch.bfloat16)
LIVE: list[torch.Tensor] = []


def call_of(facts, out_weights=None, out_ids=None, n=N) -> Call:
    weights, ids = outputs(n, facts.columns)
    weights = weights if out_weights is None else out_weights
    ids = ids if out_ids is None else out_ids
    LIVE.extend((weights, ids))
    return check_call(facts, ROWS[:n], weights, ids)


def options_of(facts, call=None, **given) -> CallOptions:
    names = ("image_mask", "padding_mask", "num_tokens", "input_ids")
    call = call_of(facts) if call is None else call
    return check_call_options(facts, call, *(given.pop(name, None) for name in names), given)


def mask(n=N):
    return torch.zeros(n, dtype=torch.bool)


def test_right_calls():
    text, hashed, vl = layer(), layer(tid2eid=table()), layer(bias_vl=torch.zeros(E))
    both = layer(tid2eid=table(), bias_vl=torch.zeros(E))
    by_id = layer(bias_vl=torch.zeros(E), num_image_ids=1)
    assert options_of(text) == NO_OPTIONS
    rows, count = mask(), ints(1)
    assert options_of(text, padding_mask=rows) == (0, rows.data_ptr(), 0, 0, 0, NO_RARE)
    assert options_of(text, num_tokens=count) == (0, 0, count.data_ptr(), 0, 0, NO_RARE)
    assert options_of(text, num_tokens=count[0]) == (0, 0, count.data_ptr(), 0, 0, NO_RARE)
    images = mask()
    assert options_of(vl, image_mask=images, padding_mask=rows)[:2] == (
        images.data_ptr(),
        rows.data_ptr(),
    )
    for dtype, wide in ((torch.int32, 0), (torch.int64, 1)):
        tokens = torch.zeros(N, dtype=dtype)
        assert options_of(hashed, input_ids=tokens)[:5] == (0, 0, 0, tokens.data_ptr(), wide)
        assert options_of(both, input_ids=tokens, image_mask=images)[:5] == (
            *(images.data_ptr(), 0, 0),
            *(tokens.data_ptr(), wide),
        )
        assert options_of(by_id, input_ids=tokens)[:5] == (0, 0, 0, tokens.data_ptr(), wide)


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
            "input_ids: expected None, since the layer has no tid2eid and no num_image_ids (got to",
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
            {"bias_vl": torch.zeros(E), "num_image_ids": 5},
            {},
            TypeError,
            "input_ids: expected a torch.Tensor of the 3 rows' token ids, which the layer's num_im",
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


def chosen(n=N, dtype=torch.int32, stride=TOP_K):
    return torch.zeros(n * stride, dtype=dtype).as_strided((n, TOP_K), (stride, 1))


def test_right_rare_options():
    facts = layer()
    rows, logical, logits = mask(), ints(N + 1, TOP_K + 2), torch.zeros(N, E + 3)
    for dtype, wide in ((torch.int32, 0), (torch.int64, 1)):
        for stride in (TOP_K, TOP_K + 3):
            ids = chosen(dtype=dtype, stride=stride)
            assert options_of(facts, forced_ids=ids, forced_mask=rows) == (
                *(0, 0, 0, 0, 0),
                (ids.data_ptr(), stride, wide, rows.data_ptr(), 0, 0, 0, 0),
            )
            assert options_of(facts, forced_ids=ids).rare.forced_mask == 0
    assert options_of(facts, out_logical_ids=logical).rare == (
        *(0, 0, 0, 0),
        *(logical.data_ptr(), TOP_K + 2, 0, 0),
    )
    assert options_of(facts, out_logits=logits).rare == (
        *(0, 0, 0, 0, 0, 0),
        *(logits.data_ptr(), E + 3),
    )
    assert options_of(facts, forced_ids=None, out_logits=None) == NO_OPTIONS
    hashed = layer(tid2eid=table(), bias_vl=torch.zeros(E))
    options_of(hashed, input_ids=ints(N), out_logits=logits, forced_ids=chosen())


def test_one_row_of_rare_options_has_no_stride_and_no_row_no_element():
    facts = layer()
    far = torch.zeros(1, TOP_K, dtype=torch.int32).as_strided((1, TOP_K), (1, 1))
    options_of(facts, call_of(facts, n=1), forced_ids=far, out_logical_ids=far.clone())
    none = {"forced_ids": chosen(0), "out_logical_ids": ints(0, TOP_K), "forced_mask": mask(0)}
    options_of(facts, call_of(facts, n=0), out_logits=torch.zeros(0, E), **none)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"forced": chosen()},
            TypeError,
            "unexpected keyword argument 'forced' (beside the others: forced_ids, forced_mask, out",
        ),
        ({"forced_ids": [[0] * TOP_K] * N}, TypeError, "forced_ids: expected a torch.Tensor (got"),
        (
            {"forced_ids": chosen(dtype=torch.int16)},
            TypeError,
            "forced_ids: expected dtype torch.int32 or torch.int64 (got torch.int16)",
        ),
        (
            {"forced_ids": ints(N, TOP_K + 1)},
            ValueError,
            "forced_ids: expected shape [3, 4] (N, top_k) (got shape [3, 5])",
        ),
        ({"forced_ids": ints(N + 1, TOP_K)}, ValueError, "forced_ids: expected shape [3, 4]"),
        ({"forced_ids": ints(N * TOP_K)}, ValueError, "forced_ids: expected 2 dimensions (got sh"),
        (
            {"forced_ids": ints(TOP_K, N).t()},
            ValueError,
            "forced_ids: expected unit stride along the last dimension (got shape [3, 4] with str",
        ),
        (
            {"forced_ids": ints(1, TOP_K).expand(N, TOP_K)},
            ValueError,
            "forced_ids: expected a row stride of at least top_k (4) and below 2**31 elements (got "
            "shape [3, 4] with",
        ),
        (
            {"forced_ids": chosen().to("meta")},
            ValueError,
            "forced_ids: expected device cpu, where W_gate is (got device meta)",
        ),
        (
            {"forced_mask": mask()},
            TypeError,
            "forced_ids: expected a torch.Tensor beside forced_mask (got None); pass the ids of",
        ),
        (
            {"forced_ids": chosen(), "forced_mask": mask().int()},
            TypeError,
            "forced_mask: expected dtype torch.bool (got torch.int32)",
        ),
        (
            {"forced_ids": chosen(), "forced_mask": mask(N - 1)},
            ValueError,
            "forced_mask: expected shape [3], one for each row of hidden_states (got shape [2])",
        ),
        (
            {"out_logical_ids": ints(N, TOP_K).long()},
            TypeError,
            "out_logical_ids: expected dtype torch.int32 (got torch.int64)",
        ),
        (
            {"out_logical_ids": ints(N, TOP_K - 1)},
            ValueError,
            "out_logical_ids: expected at least [3, 4] (N, top_k) (got shape [3, 3])",
        ),
        (
            {"out_logical_ids": ints(N - 1, TOP_K)},
            ValueError,
            "out_logical_ids: expected at least [3, 4] (N, top_k) (got shape [2, 4])",
        ),
        (
            {"out_logical_ids": ints(TOP_K, N).t()},
            ValueError,
            "out_logical_ids: expected unit stride along the last dimension",
        ),
        (
            {"out_logits": torch.zeros(N, E).bfloat16()},
            TypeError,
            "out_logits: expected dtype torch.float32 (got torch.bfloat16)",
        ),
        (
            {"out_logits": torch.zeros(N, E - 1)},
            ValueError,
            "out_logits: expected at least [3, 16] (N, num_experts) (got shape [3, 15])",
        ),
        (
            {"out_logits": torch.zeros(1, E).expand(N, E)},
            ValueError,
            "out_logits: expected a row stride of at least num_experts (16)",
        ),
        (
            {"out_logits": torch.zeros(N, E).to("meta")},
            ValueError,
            "out_logits: expected device cpu, where W_gate is (got device meta)",
        ),
    ],
)
def test_wrong_rare_options(wrong, error, message):
    with pytest.raises(error) as caught:
        options_of(layer(), **wrong)
    assert message in str(caught.value)


def test_a_hash_layer_without_bias_vl_has_no_logits_of_the_whole_gate():
    hashed = layer(tid2eid=table())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        options_of(hashed, input_ids=ints(N), out_logits=torch.zeros(N, E))
    assert str(caught.value) == (
        "out_logits: expected None, since a hash layer without bias_vl computes the logits of its "
        "own experts alone (got a tensor)"
    )


def test_rare_outputs_lie_apart_from_everything():
    """Each of the two, laid over each other tensor of the call."""
    facts = layer(bias_vl=torch.zeros(E), num_image_ids=1)
    shapes = {
        "hidden_states": ((N, K), torch.bfloat16),
        "image_mask": ((N,), torch.bool),
        "padding_mask": ((N,), torch.bool),
        "num_tokens": ((1,), torch.int32),
        "input_ids": ((N,), torch.int64),
        "forced_ids": ((N, TOP_K), torch.int64),
        "forced_mask": ((N,), torch.bool),
        "out_weights": ((N, TOP_K), torch.bfloat16),
        "out_ids": ((N, TOP_K), torch.int64),
        "out_logical_ids": ((N, TOP_K), torch.int32),
        "out_logits": ((N, E), torch.float32),
    }
    for name in ("out_logical_ids", "out_logits"):
        for other, (shape, dtype) in shapes.items():
            if other == name or (other, name) == ("out_logits", "out_logical_ids"):
                continue
            memory = torch.zeros(4096, dtype=torch.int32)
            end = torch.zeros(shape, dtype=dtype).numel() * dtype.itemsize
            for start, refused in ((0, True), (-(-end // 4) - 1, True), (-(-end // 4), False)):
                given = {
                    each: torch.zeros(*form, dtype=kind) for each, (form, kind) in shapes.items()
                }
                given[other] = memory.view(dtype)[: given[other].numel()].view(shape)
                given[name] = (
                    memory[start:][: given[name].numel()]
                    .view(shapes[name][1])
                    .view(given[name].shape)
                )
                call = check_call(facts, *(given.pop(each) for each in CALL_TENSORS))
                if refused:
                    with pytest.raises(
                        ValueError, match=f"{name}: expected memory apart from {other} "
                    ):
                        options_of(facts, call, **given)
                else:
                    options_of(facts, call, **given)


CALL_TENSORS = ("hidden_states", "out_weights", "out_ids")


@pytest.mark.parametrize("name", ["forced_ids", "forced_mask"])
@pytest.mark.parametrize("out", ["out_weights", "out_ids"])
def test_what_is_forced_lies_apart_from_what_is_written(name, out):
    facts = layer()
    memory = torch.zeros(N * TOP_K, dtype=torch.int32)
    laid = memory.view(torch.float32) if out == "out_weights" else memory
    call = call_of(facts, **{out: laid.view(N, TOP_K)})
    given = {"forced_ids": memory.view(N, TOP_K)}
    if name == "forced_mask":
        given = {"forced_ids": chosen(), name: memory.view(torch.bool)[-N:]}
    with pytest.raises(ValueError, match=f"{name}: expected memory apart from {out} "):
        options_of(facts, call, **given)


def test_logical_ids_beside_physical_ones_in_one_buffer():
    facts = layer()
    buffer = ints(N, 3 * TOP_K)
    parts = [buffer[:, at : at + TOP_K] for at in (0, TOP_K, 2 * TOP_K)]
    call = call_of(facts, parts[0].view(torch.float32), parts[1])
    options_of(facts, call, out_logical_ids=parts[2])
    options_of(facts, call, forced_ids=parts[2])
    for at in (1, TOP_K + 1):
        with pytest.raises(ValueError, match="out_logical_ids: expected memory apart from out_"):
            options_of(facts, call, out_logical_ids=buffer[:, at : at + TOP_K])


def test_what_a_call_reads_lies_apart_from_what_it_writes():
    hashed = layer(tid2eid=table(), num_shared_slots=2)
    for ids_dtype in (torch.int32, torch.int64):
        weights, ids = outputs(columns=hashed.columns, ids_dtype=ids_dtype)
        weights = weights.bfloat16() if ids_dtype is torch.int64 else weights
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


@pytest.mark.parametrize("name", ["out_weights", "out_ids"])
def test_the_last_bytes_of_what_is_read_and_written_count(name):
    hashed = layer(tid2eid=table())
    dtype = {"out_weights": torch.float32, "out_ids": torch.int32}[name]
    # The second half of int64 token ids, and the last row of a strided output.
    memory = torch.zeros(2 * N * TOP_K, dtype=torch.int64)
    behind = memory.view(torch.int32)[2 * N - 1 :][: N * TOP_K].view(dtype).view(N, TOP_K)
    with pytest.raises(ValueError, match=f"input_ids: expected memory apart from {name}"):
        options_of(hashed, call_of(hashed, **{name: behind}), input_ids=memory[:N])
    strided = memory.view(dtype).as_strided((N, TOP_K), (5 * TOP_K, 1))
    last = strided[-1].view(torch.bool)[:N]
    call = call_of(hashed, **{name: strided})
    with pytest.raises(ValueError, match=f"padding_mask: expected memory apart from {name}"):
        options_of(hashed, call, input_ids=ints(N), padding_mask=last)


def test_what_follows_an_output_may_be_read():
    """One buffer: an output, and a mask right behind the last element that is written."""
    facts = layer()
    memory = torch.zeros(N * TOP_K + N, dtype=torch.bfloat16)
    call = call_of(facts, out_weights=memory[: N * TOP_K].view(N, TOP_K))
    options_of(facts, call, padding_mask=memory[N * TOP_K :].view(torch.bool)[:N])
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


@settings(max_examples=250, deadline=None)
@given(
    rows=st.integers(0, 4),
    strides=st.tuples(st.integers(4, 20), st.integers(4, 12)),
    starts=st.tuples(st.integers(0, 24), st.integers(0, 16)),
    weights_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    ids_dtype=st.sampled_from([torch.int32, torch.int64]),
    shared_slots=st.integers(0, 2),
    same_stride=st.booleans(),
)
def test_outputs_that_pass_share_no_byte(
    rows, strides, starts, weights_dtype, ids_dtype, shared_slots, same_stride
):
    """Views of one buffer: either the exact bytes are apart, or the call is refused."""
    facts = layer(num_shared_slots=shared_slots)
    size, w_size = ids_dtype.itemsize, weights_dtype.itemsize
    w_stride, i_stride = max(strides[0], facts.columns), max(strides[1], facts.columns)
    if same_stride:
        w_stride = i_stride * size // w_size
    buffer = torch.zeros(256, dtype=torch.int32)
    shape = (rows, facts.columns)
    weights = buffer.view(weights_dtype)[starts[0] :].as_strided(shape, (w_stride, 1))
    ids = buffer.view(ids_dtype)[starts[1] :].as_strided(shape, (i_stride, 1))
    apart = not bytes_of(weights, facts.columns) & bytes_of(ids, facts.columns)
    with contextlib.suppress(ValueError):
        check_call(facts, torch.zeros(rows, K, dtype=torch.bfloat16), weights, ids)
        assert apart
        return
    # Rows of unlike strides may miss each other; that is not worked out.
    assert not apart or w_stride * w_size != i_stride * size
