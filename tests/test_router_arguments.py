"""Every wrong argument is refused with its name, what is allowed and what was got."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dsv4_router_runtime import Router, dense_router_dispatch
from dsv4_router_runtime.call import _check_call_slowly, check_call, plainly_right
from dsv4_router_runtime.layer import check_layer, complete_options, layout_of

K, E, TOP_K, N = 128, 16, 4, 3


def weights(k=K, e=E, layout="kmajor", dtype=torch.bfloat16):
    if layout == "kmajor":
        return torch.zeros(e, k, dtype=dtype).t()
    return torch.zeros(k, e, dtype=dtype)


def layer(**more):
    given = {"W_gate": weights(), "e_bias": torch.zeros(E), "top_k": TOP_K} | more
    return check_layer(
        given["W_gate"],
        given["e_bias"],
        top_k=given["top_k"],
        routed_scaling_factor=more.get("routed_scaling_factor", 2.5),
        options=complete_options(more.get("options", {})),
    )


def call(**more):
    given = {
        "hidden_states": torch.zeros(N, K, dtype=torch.bfloat16),
        "out_weights": torch.zeros(N, TOP_K),
        "out_ids": torch.zeros(N, TOP_K, dtype=torch.int32),
    } | more
    return check_call(layer(), **given)[0]


def unaligned(shape, dtype, by=1):
    """A tensor whose data starts `by` elements past an aligned address."""
    count = 1
    for size in shape:
        count *= size
    return torch.zeros(count + by, dtype=dtype)[by:].view(shape)


def bf16(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


def test_right_arguments():
    facts = layer(routed_scaling_factor=2)
    assert (facts.k, facts.num_experts, facts.top_k, facts.scale) == (K, E, TOP_K, 2.0)
    assert (facts.layout, facts.tma_loadable) == ("kmajor", True)
    assert call() == N


@pytest.mark.parametrize(
    ("W_gate", "layout", "loadable"),
    [
        (weights(), "kmajor", True),
        (weights(layout="emajor"), "emajor", True),
        (weights(e=132, layout="emajor"), "emajor", False),
        (weights(e=132), "kmajor", True),
        (weights(e=1), "kmajor", True),
        (weights(e=1, layout="emajor"), "kmajor", True),
        (weights(e=3, layout="emajor")[:, :1], "emajor", False),
        (bf16(E, 2 * K)[:, :K].t(), "kmajor", True),
        (bf16(K, 24)[:, :16], "emajor", True),
        (bf16(K, 24)[:, 8:], "emajor", True),
    ],
)
def test_layouts(W_gate, layout, loadable):
    facts = layer(W_gate=W_gate, e_bias=torch.zeros(W_gate.shape[1]), top_k=1)
    assert (facts.layout, facts.tma_loadable) == (layout, loadable)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"W_gate": None}, TypeError, "W_gate: expected a torch.Tensor (got NoneType)"),
        (
            {"W_gate": weights(dtype=torch.float16)},
            TypeError,
            "W_gate: expected dtype torch.bfloat16 (got torch.float16)",
        ),
        ({"W_gate": bf16(K)}, ValueError, "W_gate: expected 2 dimensions (got shape [128])"),
        (
            {"W_gate": weights(k=100)},
            ValueError,
            "W_gate: expected K (shape[0]) in multiples of 64",
        ),
        ({"W_gate": weights(k=0)}, ValueError, "W_gate: expected K (shape[0]) in multiples of 64"),
        ({"W_gate": weights(e=513)}, ValueError, "W_gate: expected 1..512 experts"),
        ({"W_gate": weights(e=0)}, ValueError, "W_gate: expected 1..512 experts"),
        (
            {"W_gate": bf16(384, 7168)},
            ValueError,
            "W_gate: expected 1..512 experts (shape[1]) (got shape [384, 7168]: an nn.Linear's "
            "weight is [E, K] and W_gate [K, E], so pass weight.t(), which copies nothing)",
        ),
        ({"W_gate": bf16(216, 4096)}, ValueError, "(got shape [216, 4096]: an nn.Linear's weight"),
        ({"W_gate": bf16(600, 7168)}, ValueError, "multiples of 64 (got shape [600, 7168])"),
        ({"W_gate": bf16(64, 513)}, ValueError, "1..512 experts (shape[1]) (got shape [64, 513])"),
        ({"W_gate": bf16(2 * E, 2 * K)[::2, ::2].t()}, ValueError, "W_gate: expected unit stride"),
        ({"W_gate": bf16(1).expand(K, E)}, ValueError, "W_gate: expected unit stride along K"),
        (
            {"W_gate": bf16(2 * K).as_strided((K, E), (1, 1))},
            ValueError,
            "rows not overlapping (got shape [128, 16] with strides (1, 1))",
        ),
        ({"W_gate": bf16(E, K + 4)[:, :K].t()}, ValueError, "a stride along E in multiples of 8"),
        ({"W_gate": unaligned((E, K), torch.bfloat16).t()}, ValueError, "aligned to 16 bytes (got"),
        (
            {"W_gate": unaligned((E, K), torch.bfloat16, by=4).t()},
            ValueError,
            "W_gate: expected data aligned to 16 bytes (got",
        ),
        ({"e_bias": [0.0] * E}, TypeError, "e_bias: expected a torch.Tensor (got list)"),
        ({"e_bias": torch.zeros(E).double()}, TypeError, "e_bias: expected dtype torch.float32"),
        ({"e_bias": torch.zeros(E, 1)}, ValueError, "e_bias: expected 1 dimension (got shape"),
        ({"e_bias": torch.zeros(E + 1)}, ValueError, "e_bias: expected shape [16], one for each"),
        ({"e_bias": torch.zeros(2 * E)[::2]}, ValueError, "e_bias: expected unit stride"),
        (
            {"e_bias": torch.zeros(E, device="meta")},
            ValueError,
            "e_bias: expected device cpu, where",
        ),
        ({"top_k": 0}, ValueError, "top_k: expected 1..8 (got 0)"),
        ({"top_k": 9}, ValueError, "top_k: expected 1..8 (got 9)"),
        ({"top_k": 10**5000}, ValueError, "top_k: expected 1..8 (got an int of 16610 bits)"),
        ({"top_k": 4.0}, TypeError, "top_k: expected an int (got float)"),
        ({"top_k": True}, TypeError, "top_k: expected an int (got bool)"),
        (
            {"top_k": 4, "W_gate": weights(e=3), "e_bias": torch.zeros(3)},
            ValueError,
            "top_k: expected at most the 3 experts of W_gate (got 4)",
        ),
        (
            {"routed_scaling_factor": torch.ones(())},
            TypeError,
            "routed_scaling_factor: expected a float (got Tensor)",
        ),
        ({"routed_scaling_factor": True}, TypeError, "routed_scaling_factor: expected a float"),
        (
            {"routed_scaling_factor": float("nan")},
            ValueError,
            "routed_scaling_factor: expected a finite number in FP32's range, -3.40282347e+38.."
            "3.40282347e+38 (got nan)",
        ),
        ({"routed_scaling_factor": float("inf")}, ValueError, "FP32's range, -3.40282347e+38.."),
        ({"routed_scaling_factor": 1e300}, ValueError, "routed_scaling_factor: expected a finite"),
        ({"routed_scaling_factor": -3.403e38}, ValueError, "3.40282347e+38 (got -3.403e+38)"),
        ({"routed_scaling_factor": 10**39}, ValueError, "(got an int of 130 bits)"),
        ({"routed_scaling_factor": 10**400}, ValueError, "routed_scaling_factor: expected a fini"),
        ({"routed_scaling_factor": -(10**5000)}, ValueError, "(got an int of 16610 bits)"),
    ],
)
def test_wrong_layer(wrong, error, message):
    with pytest.raises(error) as caught:
        layer(**wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"hidden_states": 1}, TypeError, "hidden_states: expected a torch.Tensor (got int)"),
        ({"hidden_states": torch.zeros(N, K)}, TypeError, "hidden_states: expected dtype"),
        ({"hidden_states": bf16(K)}, ValueError, "hidden_states: expected 2 dimensions"),
        ({"hidden_states": bf16(N, K + 64)}, ValueError, "hidden_states: expected shape [N, 128]"),
        (
            {"hidden_states": bf16(N, K).to("meta")},
            ValueError,
            "hidden_states: expected device cpu",
        ),
        ({"hidden_states": bf16(N, 2 * K)[:, ::2]}, ValueError, "unit stride along K (got shape"),
        ({"hidden_states": bf16(N, K + 4)[:, :K]}, ValueError, "a row stride of at least K and a"),
        ({"hidden_states": bf16(1, K).expand(N, K)}, ValueError, "a row stride of at least K"),
        ({"hidden_states": unaligned((N, K), torch.bfloat16)}, ValueError, "aligned to 16 bytes"),
        (
            {"hidden_states": unaligned((N, K), torch.bfloat16, by=4)},
            ValueError,
            "hidden_states: expected data aligned to 16 bytes",
        ),
        (
            {"hidden_states": bf16(N, K).to_sparse()},
            ValueError,
            "hidden_states: expected a dense tensor",
        ),
        (
            {"out_weights": torch.zeros(N, TOP_K).half()},
            TypeError,
            "out_weights: expected dtype torch.float32 or torch.bfloat16 (got torch.float16)",
        ),
        ({"out_weights": torch.zeros(N * TOP_K)}, ValueError, "out_weights: expected 2 dimensions"),
        (
            {"out_weights": torch.zeros(N - 1, TOP_K)},
            ValueError,
            "out_weights: expected at least [3, 4] (N, top_k) (got shape [2, 4])",
        ),
        ({"out_weights": torch.zeros(N, TOP_K - 1)}, ValueError, "out_weights: expected at least"),
        (
            {"out_weights": torch.zeros(TOP_K, N).t()},
            ValueError,
            "out_weights: expected unit stride",
        ),
        (
            {"out_weights": torch.zeros(1, TOP_K).expand(N, -1)},
            ValueError,
            "a row stride of at least",
        ),
        (
            {"out_ids": torch.zeros(N, TOP_K).short()},
            TypeError,
            "out_ids: expected dtype torch.int32 or torch.int64 (got torch.int16)",
        ),
        ({"out_ids": torch.zeros(N, 3).int()}, ValueError, "out_ids: expected at least [3, 4]"),
        ({"out_ids": torch.zeros(2, 4).int()}, ValueError, "out_ids: expected at least [3, 4]"),
        (
            {"out_ids": torch.zeros(N, TOP_K, device="meta").int()},
            ValueError,
            "out_ids: expected device cpu, where W_gate is (got device meta)",
        ),
    ],
)
def test_wrong_call(wrong, error, message):
    with pytest.raises(error) as caught:
        call(**wrong)
    assert message in str(caught.value)


def test_allowed_views():
    assert call(hidden_states=bf16(N, K + 8)[:, :K]) == N
    assert call(hidden_states=bf16(1, K + 4)[:, :K]) == 1
    assert call(hidden_states=bf16(0, K)) == 0
    assert call(out_weights=torch.zeros(N + 2, TOP_K + 3), out_ids=torch.zeros(99, 9).int()) == N


def test_outputs_must_not_share_elements():
    buffer = torch.zeros(N, 2 * TOP_K + 2)
    w = buffer[:, :TOP_K]
    ids = buffer.view(torch.int32)
    assert call(out_weights=w, out_ids=ids[:, TOP_K:]) == N
    for overlapping in (ids, ids[:, TOP_K - 1 :]):
        with pytest.raises(ValueError, match="out_ids: expected memory apart from out_weights"):
            call(out_weights=w, out_ids=overlapping)
    # Other strides, and columns that reach into the next row.
    flat = torch.zeros(64)
    for stride, ids_stride, at in ((10, 5, 5), (10, 10, 8)):
        w = flat.as_strided((N, TOP_K), (stride, 1))
        ids = flat.view(torch.int32)[at:].as_strided((N, TOP_K), (ids_stride, 1))
        with pytest.raises(ValueError, match="out_ids: expected memory apart from out_weights"):
            call(out_weights=w, out_ids=ids)
    flat = torch.zeros(N * TOP_K + 2)
    first = flat[:12].view(N, TOP_K)
    with pytest.raises(ValueError, match="out_ids: expected memory apart from out_weights"):
        call(out_weights=first, out_ids=flat[2:].view(torch.int32).view(N, TOP_K))


def test_outputs_must_not_share_elements_with_the_input():
    x = bf16(N, K)
    with pytest.raises(ValueError, match="out_weights: expected memory apart from hidden_states"):
        call(hidden_states=x, out_weights=x.view(torch.float32)[:, :TOP_K])
    with pytest.raises(ValueError, match="out_ids: expected memory apart from hidden_states"):
        call(hidden_states=x, out_ids=x.view(torch.int32)[:, 8:])
    # In the gap after the second of three strided rows, and in the last row.
    buffer = bf16(2 * 4 * K + K)
    for at in (5 * K + 8, 8 * K):
        out = buffer[at : at + N * TOP_K].view(N, TOP_K)
        with pytest.raises(ValueError, match="out_weights: expected memory apart from hidden"):
            call(hidden_states=buffer.as_strided((N, K), (4 * K, 1)), out_weights=out)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.tuples(st.integers(0, 4), st.integers(2, 5), st.integers(2, 5)),
    columns=st.tuples(
        st.sampled_from([K, K, K, K - 8, K + 64]), st.integers(3, 6), st.integers(3, 6)
    ),
    padding=st.tuples(st.sampled_from([0, 8, 8, 4]), st.integers(0, 2), st.integers(0, 2)),
    start=st.tuples(st.sampled_from([0, 8, 8, 4]), st.integers(0, 999), st.integers(0, 999)),
    shared=st.booleans(),
    weights_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ids_dtype=st.sampled_from([torch.int32, torch.int64, torch.int16]),
    slots=st.sampled_from([0, 0, 1]),
)
def test_the_quick_check_never_passes_what_the_rules_refuse(
    rows, columns, padding, start, shared, weights_dtype, ids_dtype, slots
):
    """Views of one buffer or of three, of any shape, stride, start and overlap."""
    facts = layer(options={"num_shared_slots": slots})
    dtypes = (torch.bfloat16, weights_dtype, ids_dtype)
    buffer = torch.zeros(4096, dtype=torch.int32)
    tensors = [
        (buffer if shared else torch.zeros_like(buffer))
        .view(dtype)[at:]
        .as_strided((n, width), (width + more, 1))
        for dtype, n, width, more, at in zip(dtypes, rows, columns, padding, start, strict=True)
    ]
    quick = plainly_right(facts, *tensors)
    if quick is not None:
        assert _check_call_slowly(facts, *tensors) == quick


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_the_quick_check_takes_the_usual_call(ids_dtype, weights_dtype):
    outputs = torch.zeros(N, TOP_K), torch.zeros(N + 1, TOP_K + 2)
    usual = bf16(N, K), outputs[0].to(weights_dtype), outputs[1].to(ids_dtype)
    assert plainly_right(layer(), *usual) == _check_call_slowly(layer(), *usual)
    quick = plainly_right(layer(), *usual)
    assert quick.num_tokens == N
    assert quick.weights_are_bfloat16 == (weights_dtype is torch.bfloat16)
    assert quick.ids_are_int64 == (ids_dtype is torch.int64)


def test_the_quick_check_takes_bfloat16_weights_right_before_ids():
    """Half as long as FP32 weights: an end as of those would meet the ids."""
    memory = torch.zeros(N * TOP_K * 3, dtype=torch.bfloat16)
    weights = memory[: N * TOP_K].view(N, TOP_K)
    ids = memory[N * TOP_K :].view(torch.int32).view(N, TOP_K)
    assert plainly_right(layer(), bf16(N, K), weights, ids) is not None
    assert plainly_right(layer(), bf16(N, K), weights.view(-1)[1:].view(torch.int16), ids) is None


def test_the_quick_check_takes_no_rows():
    usual = bf16(N, K), torch.zeros(N, TOP_K), torch.zeros(N, TOP_K).int()
    assert plainly_right(layer(), usual[0][:0], *usual[1:])[0] == 0


@pytest.mark.parametrize("freed", [0, 1, 2])
def test_a_tensor_whose_memory_was_freed_is_refused(freed):
    usual = bf16(N, K), torch.zeros(N, TOP_K), torch.zeros(N, TOP_K).int()
    usual[freed].untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="address 0"):
        check_call(layer(), *usual)


def test_single_expert_reads_as_kmajor():
    assert layout_of(bf16(K, 1)) == "kmajor"
    assert layout_of(bf16(K, 2)[:, :1]) == "emajor"


def test_cpu_tensors_are_refused_before_anything_else():
    message = r"W_gate: expected a CUDA device \(got device cpu\)"
    outputs = torch.zeros(N, TOP_K), torch.zeros(N, TOP_K).int()
    with pytest.raises(ValueError, match=message):
        dense_router_dispatch(bf16(N, K), weights(), torch.zeros(E), 2.5, TOP_K, *outputs)


def test_the_largest_fp32_scale_is_taken():
    largest = torch.finfo(torch.float32).max
    for scale in (largest, -largest, 10**38, 0, 1e-60):
        assert layer(routed_scaling_factor=scale).scale == float(scale)


@pytest.mark.parametrize("artifacts", [3, b"artifacts", ("artifacts",)])
def test_router_names_what_is_no_folder_of_artifacts(artifacts):
    with pytest.raises(TypeError) as caught:
        Router(weights(), torch.zeros(E), top_k=4, routed_scaling_factor=1.0, artifacts=artifacts)
    assert str(caught.value) == (
        "artifacts: expected a folder (str or os.PathLike), an ArtifactSet or None "
        f"(got {type(artifacts).__name__})"
    )


def test_router_checks_the_layer_before_it_looks_for_artifacts(tmp_path):
    with pytest.raises(ValueError, match=r"top_k: expected 1\.\.8"):
        Router(weights(), torch.zeros(E), top_k=9, routed_scaling_factor=1.0, artifacts=tmp_path)


# ---------------------------------------------------------------- tensors that torch traces with


def without_memory():
    """What a layer and a call are given while torch traces: a name for each, and the tensors."""
    with FakeTensorMode():
        fakes = weights(), torch.zeros(E), bf16(N, K), torch.zeros(N, TOP_K)
    freed = weights(), torch.zeros(E), bf16(N, K), torch.zeros(N, TOP_K)
    for tensor in freed:
        tensor.untyped_storage().resize_(0)
    return {"fake": fakes, "freed": freed}


@pytest.mark.parametrize("kind", ["fake", "freed"])
def test_a_layer_of_tensors_without_memory_is_refused(kind):
    """Bound, they would be an address of 0 and a fault at the first call."""
    W_gate, e_bias, *_ = without_memory()[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match="W_gate: expected a tensor with memory"):
            layer(W_gate=W_gate)
        with pytest.raises(TypeError, match="e_bias: expected a tensor with memory"):
            layer(e_bias=e_bias)


@pytest.mark.parametrize("name", ["hidden_states", "out_weights"])
def test_a_call_on_fake_tensors_says_that_torch_is_tracing(name):
    *_, x, out = without_memory()["fake"]
    given = {"hidden_states": x, "out_weights": out}
    with pytest.raises(TypeError) as caught:
        call(**{name: given[name]})
    message = str(caught.value)
    assert message.startswith(f"{name}: expected a tensor with memory (got a FakeTensor")
    for word in (
        "torch.export",
        "fullgraph=True",
        "integrations.torch_op",
        "torch.compiler.disable",
    ):
        assert word in message
    assert "overlap" not in message


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.functionalize(f),
        lambda f: lambda *tensors: torch.vmap(f)(*(tensor[None] for tensor in tensors)),
        lambda f: make_fx(f, tracing_mode="fake"),
    ],
    ids=["functionalize", "vmap", "make_fx"],
)
def test_a_call_inside_a_transform_says_that_torch_is_tracing(transform):
    facts = layer()

    def route(x, out, ids):
        check_call(facts, x, out, ids)
        return out

    tensors = bf16(N, K), torch.zeros(N, TOP_K), torch.zeros(N, TOP_K, dtype=torch.int32)
    with pytest.raises(TypeError, match="hidden_states: expected a tensor with memory"):
        transform(route)(*tensors)
