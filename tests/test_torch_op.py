"""The router as operators of torch: on a CPU by the reference, on a GPU by Router."""

from __future__ import annotations

import gc
import itertools
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

from gpu_recorder import replace_gpu, table_of  # noqa: E402
from torch._functorch import eager_transforms as functorch  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from dsv4_router_runtime import Router, RouterError, router_reference  # noqa: E402
from dsv4_router_runtime.integrations import bound_layers, torch_op  # noqa: E402
from dsv4_router_runtime.router import MAX_REMEMBERED_LAYERS  # noqa: E402

K, E, TOP_K, SCALE, VOCABULARY = 128, 32, 6, 2.5, 9


pytestmark = pytest.mark.usefixtures("nothing_bound")


@pytest.fixture
def random(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Bind a Router to tensors of the CPU, with a recorder in the GPU's place."""
    monkeypatch.setattr(bound_layers, "CpuRouter", bound_layers.Router)
    return replace_gpu(monkeypatch)


def layer(random, device="cpu", k=K, num_experts=E):
    """Return weight [E, K] and e_bias [E] of a layer."""
    weight = torch.randn(num_experts, k, generator=random).bfloat16().to(device)
    e_bias = torch.randn(num_experts, generator=random).to(device)
    return torch.nn.Parameter(weight, requires_grad=False), e_bias


def rows(random, num_tokens=5, device="cpu", k=K):
    return torch.randn(num_tokens, k, generator=random).bfloat16().to(device)


def outputs(num_tokens=5, columns=TOP_K, ids_dtype=torch.int32, device="cpu"):
    return (
        torch.full((num_tokens, columns), -77.0, device=device),
        torch.full((num_tokens, columns), -77, dtype=ids_dtype, device=device),
    )


def hash_table(random, num_experts=E):
    rows = [torch.randperm(num_experts, generator=random)[:TOP_K] for _ in range(VOCABULARY)]
    return torch.stack(rows)


def check(got, hidden_states, weight, e_bias, **options):
    weights, ids = router_reference(hidden_states, weight.t(), e_bias, SCALE, TOP_K, **options)
    assert torch.equal(got[1].long(), ids.long())
    torch.testing.assert_close(got[0].double(), weights, rtol=1e-5, atol=1e-6)


def all_options(random, device="cpu", num_tokens=5):
    """Return every option of a layer that is no hash layer, and of its calls."""
    return {
        "bias_vl": torch.randn(E, generator=random).to(device),
        "gate_temp": 0.5,
        "to_physical": torch.arange(2 * E, dtype=torch.int32, device=device).reshape(E, 2),
        "logical_count": torch.full((E,), 2, dtype=torch.int32, device=device),
        "num_shared_slots": 1,
        "shared_weight": 0.4,
        "norm_topk_prob": False,
        "first_image_id": 3,
        "num_image_ids": 2,
        "input_ids": torch.arange(num_tokens, device=device),
        "forced_ids": torch.arange(TOP_K, device=device).expand(num_tokens, -1).flip(1).clone(),
        "forced_mask": torch.arange(num_tokens, device=device) == 1,
        "image_mask": torch.arange(num_tokens, device=device) % 2 == 1,
        "padding_mask": torch.arange(num_tokens, device=device) == 2,
        "num_tokens": torch.tensor([num_tokens - 1], dtype=torch.int32, device=device),
    }


# On a CPU


def test_route_writes_the_references_rows_and_nothing_else(random):
    weight, e_bias = layer(random)
    x = rows(random)
    out = outputs(7, 8)
    torch_op.route(x, weight, e_bias, SCALE, TOP_K, *out)
    check([part[:5, :TOP_K] for part in out], x, weight, e_bias)
    for part in out:
        assert (part[5:] == -77).all()
        assert (part[:, TOP_K:] == -77).all()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_every_option_reaches_the_reference(random, ids_dtype):
    weight, e_bias = layer(random)
    x, options = rows(random), all_options(random)
    out = outputs(5, TOP_K + 1, ids_dtype)
    torch_op.route_options(x, weight, e_bias, SCALE, TOP_K, *out, **options)
    check(out, x, weight, e_bias, **options)
    twin = torch_op.route_functional(
        x, weight, e_bias, SCALE, TOP_K, **options, ids_dtype=ids_dtype
    )
    for ours, other in zip(out, twin, strict=True):
        assert ours.dtype == other.dtype
        assert torch.equal(ours, other)


def optional_outputs(num_tokens=5, num_experts=E, device="cpu"):
    """Return out_logical_ids and out_logits with a row and a column to spare."""
    return {
        "out_logical_ids": outputs(num_tokens + 1, TOP_K + 1, device=device)[1],
        "out_logits": outputs(num_tokens + 1, num_experts + 1, device=device)[0],
    }


def check_optional(asked, x, weight, e_bias, **options):
    """Compare optional outputs with the reference without a map, and with the FP64 product."""
    n = len(x)
    unmapped = options | {"to_physical": None, "logical_count": None, "num_shared_slots": 0}
    _, ids = router_reference(x, weight.t(), e_bias, SCALE, TOP_K, **unmapped)
    logical, logits = asked.values()
    assert torch.equal(logical[:n, :TOP_K], ids)
    torch.testing.assert_close(
        logits[:n, :E].double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4
    )
    for out in (logical, logits):
        assert (out[n:] == -77).all()
        assert (out[:, -1] == -77).all()


def test_optional_outputs_are_the_references_ids_and_logits(random):
    weight, e_bias = layer(random)
    x, options, asked = rows(random), all_options(random), optional_outputs()
    out = outputs(5, TOP_K + 1)
    torch_op.route_options(x, weight, e_bias, SCALE, TOP_K, *out, **options, **asked)
    check(out, x, weight, e_bias, **options)
    check_optional(asked, x, weight, e_bias, **options)


def test_bfloat16_weights_are_the_fp32_ones_rounded(random):
    weight, e_bias = layer(random)
    given = (rows(random), weight, e_bias, SCALE, TOP_K)
    wide, _ = torch_op.route_functional(*given)
    narrow, _ = torch_op.route_functional(*given, weights_dtype=torch.bfloat16)
    assert narrow.dtype is torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())
    out = outputs()
    out = out[0].bfloat16(), out[1]
    torch_op.route(*given, *out)
    assert torch.equal(out[0], narrow)


def test_a_hash_layer_takes_its_ids_from_the_table(random):
    weight, _ = layer(random)
    x, tid2eid = rows(random), hash_table(random)
    tokens = torch.tensor([3, 0, 8, -1, 9])
    got = torch_op.route_functional(
        x, weight, None, SCALE, TOP_K, tid2eid=tid2eid, input_ids=tokens
    )
    check(got, x, weight, None, tid2eid=tid2eid, input_ids=tokens)


def test_without_ids_dtype_the_ids_are_int32(random):
    weight, e_bias = layer(random)
    got = torch_op.route_functional(rows(random), weight, e_bias, SCALE, TOP_K)
    assert [part.dtype for part in got] == [torch.float32, torch.int32]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": lambda w: w.float()}, TypeError, "W_gate: expected dtype torch.bfloat16"),
        ({"weight": lambda w: w.t()}, ValueError, "so pass weight.t"),
        ({"weight": lambda w: w[None]}, ValueError, "W_gate: expected 2 dimensions"),
        ({"e_bias": lambda b: None}, TypeError, "e_bias: expected a torch.Tensor"),
        ({"x": lambda x: x[:, :64]}, ValueError, r"hidden_states: expected shape \[N, 128\]"),
        ({"top_k": lambda k: 9}, ValueError, r"top_k: expected 1\.\.8"),
    ],
)
@pytest.mark.parametrize("before", [False, True], ids=["first", "bound"])
def test_a_wrong_argument_is_refused_as_router_refuses_it(random, change, error, words, before):
    weight, e_bias = layer(random, k=128, num_experts=32)
    given = {"x": rows(random), "weight": weight, "e_bias": e_bias, "top_k": TOP_K}
    if before:
        torch_op.route(given["x"], weight, e_bias, SCALE, TOP_K, *outputs())
    given |= {name: changed(given[name]) for name, changed in change.items()}
    out = outputs()
    with pytest.raises(error, match=words):
        torch_op.route(given["x"], given["weight"], given["e_bias"], SCALE, given["top_k"], *out)
    assert all((part == -77).all() for part in out)


def test_wrong_values_of_tables_are_refused(random):
    weight, e_bias = layer(random)
    x = rows(random)
    with pytest.raises(ValueError, match="tid2eid: expected distinct ids in each row"):
        torch_op.route_functional(
            x,
            weight,
            None,
            SCALE,
            TOP_K,
            tid2eid=torch.zeros(VOCABULARY, TOP_K, dtype=torch.int64),
            input_ids=torch.arange(5),
        )
    maps = {
        "to_physical": torch.zeros(E, 1, dtype=torch.int32),
        "logical_count": torch.zeros(E, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=r"logical_count: expected 1\.\.1"):
        torch_op.route_functional(x, weight, e_bias, SCALE, TOP_K, **maps)


def test_wrong_options_of_a_call_are_refused(random):
    weight, e_bias = layer(random)
    plain = (rows(random), weight, e_bias, SCALE, TOP_K)
    with pytest.raises(ValueError, match="input_ids: expected None, since the layer has no tid"):
        torch_op.route_functional(*plain, input_ids=torch.arange(5))
    with pytest.raises(ValueError, match=r"padding_mask: expected shape \[5\]"):
        torch_op.route_functional(*plain, padding_mask=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"input_ids: expected a torch\.Tensor"):
        torch_op.route_functional(
            rows(random), weight, None, SCALE, TOP_K, tid2eid=hash_table(random)
        )


# What a call remembers


def versions_of(random):
    """Yield layers that one call binds and the next must not take for the same."""
    weight, e_bias = layer(random)
    yield "first", (weight, e_bias, SCALE, TOP_K), {}
    yield "scale", (weight, e_bias, 1.0, TOP_K), {}
    yield "top_k", (weight, e_bias, SCALE, 3), {}
    yield "bias", (weight, e_bias.flip(0).contiguous(), SCALE, TOP_K), {}
    yield "fewer experts", (weight[:16], e_bias[:16], SCALE, TOP_K), {}
    yield "gate_temp", (weight, e_bias, SCALE, TOP_K), {"gate_temp": 2.0}
    yield "a slot", (weight, e_bias, SCALE, TOP_K), {"num_shared_slots": 2}
    yield "norm", (weight, e_bias, SCALE, TOP_K), {"norm_topk_prob": False}
    slot = {"num_shared_slots": 2}
    yield "shared weight", (weight, e_bias, SCALE, TOP_K), {**slot, "shared_weight": 0.4}


@pytest.mark.parametrize("operator", ["route", "route_options"])
def test_layers_are_told_apart_in_any_order(random, operator):
    x = rows(random)
    layers = [item for item in versions_of(random) if operator == "route_options" or not item[2]]
    for pair in itertools.permutations(layers, 2):
        for name, (weight, e_bias, scale, top_k), options in pair:
            out = outputs(5, top_k + options.get("num_shared_slots", 0))
            getattr(torch_op, operator)(x, weight, e_bias, scale, top_k, *out, **options)
            weights, ids = router_reference(x, weight.t(), e_bias, scale, top_k, **options)
            assert torch.equal(out[1], ids), name
            torch.testing.assert_close(out[0].double(), weights, rtol=1e-5, atol=1e-6, msg=name)


def test_a_layer_that_was_pruned_in_place_is_bound_again(random):
    """The same tensors at the same address, with half the experts."""
    weight, e_bias = layer(random)
    x = rows(random)
    torch_op.route_functional(x, weight, e_bias, SCALE, TOP_K)
    weight.data, e_bias.data = weight.data[: E // 2], e_bias.data[: E // 2]
    check(torch_op.route_functional(x, weight, e_bias, SCALE, TOP_K), x, weight, e_bias)


def test_a_bias_that_was_moved_is_read_where_it_is(random, as_on_a_gpu):
    weight, e_bias = layer(random)
    x, out = rows(random), outputs()
    torch_op.route(x, weight, e_bias, SCALE, TOP_K, *out)
    e_bias.data = e_bias.data.flip(0).contiguous()
    torch_op.route(x, weight, e_bias, SCALE, TOP_K, *out)
    assert as_on_a_gpu.last["e_bias"] == e_bias.data_ptr()


def test_another_bias_at_the_same_address_is_checked(random):
    weight, e_bias = layer(random)
    x, out = rows(random), outputs()
    torch_op.route(x, weight, e_bias, SCALE, TOP_K, *out)
    with pytest.raises(ValueError, match=r"e_bias: expected shape \[32\]"):
        torch_op.route(x, weight, e_bias[:16], SCALE, TOP_K, *out)


def test_a_moved_weight_leaves_nothing_behind(random):
    weight, e_bias = layer(random)
    x = rows(random)
    torch_op.route_functional(x, weight, e_bias, SCALE, TOP_K)
    weight.data = weight.data.flip(0).contiguous()
    check(torch_op.route_functional(x, weight, e_bias, SCALE, TOP_K), x, weight, e_bias)
    assert len(bound_layers.layers) == len(bound_layers.plain_layers) == 1


@pytest.mark.parametrize("how", ["moved", "replaced"])
@pytest.mark.parametrize("which", ["e_bias", "tid2eid"])
def test_other_tensors_that_come_and_go_leave_few_layers(random, how, which):
    weight, e_bias = layer(random)
    x = rows(random)
    options = {"tid2eid": hash_table(random), "input_ids": torch.arange(5)}
    kept = []  # Their addresses are not used again.
    for _ in range(bound_layers.MAX_LAYERS_OF_A_WEIGHT + 4):
        bias, given = (e_bias, {}) if which == "e_bias" else (None, options)
        check(
            torch_op.route_functional(x, weight, bias, SCALE, TOP_K, **given),
            x,
            weight,
            bias,
            **given,
        )
        other = e_bias if which == "e_bias" else options["tid2eid"]
        kept.append(other.data)
        if how == "moved":
            other.data = other.data.flip(0).contiguous()
        elif which == "e_bias":
            e_bias = e_bias.flip(0).contiguous()
        else:
            options["tid2eid"] = other.flip(0).contiguous()
    assert len(bound_layers.layers) == (
        1 if how == "moved" else bound_layers.MAX_LAYERS_OF_A_WEIGHT
    )


def test_a_hash_layer_sees_its_table_change(random):
    weight, _ = layer(random)
    x, tokens, tid2eid = rows(random), torch.arange(5), hash_table(random)
    given = {"tid2eid": tid2eid, "input_ids": tokens}
    torch_op.route_functional(x, weight, None, SCALE, TOP_K, **given)
    tid2eid.copy_(tid2eid.flip(0).clone())
    got = torch_op.route_functional(x, weight, None, SCALE, TOP_K, **given)
    check(got, x, weight, None, **given)


@pytest.mark.parametrize("shown_by", [torch_op.forget, torch_op.refresh])
def test_a_change_that_torch_does_not_count_is_shown(random, shown_by):
    weight, _ = layer(random)
    other, _ = layer(random)
    x, tokens, tid2eid = rows(random), torch.arange(5), hash_table(random)
    given = {"tid2eid": tid2eid, "input_ids": tokens}
    before = torch_op.route_functional(x, weight, None, SCALE, TOP_K, **given)
    tid2eid.data.copy_(tid2eid.flip(0).clone())
    shown_by(other)
    got = torch_op.route_functional(x, weight, None, SCALE, TOP_K, **given)
    assert torch.equal(got[1], before[1])
    shown_by(weight)
    got = torch_op.route_functional(x, weight, None, SCALE, TOP_K, **given)
    check(got, x, weight, None, **given)


@pytest.mark.parametrize("shown_by", ["call", "refresh"])
def test_copies_are_taken_again_where_graphs_read_them(random, as_on_a_gpu, shown_by):
    weight, _ = layer(random)
    x, out = rows(random), outputs()
    given = {"tid2eid": hash_table(random), "input_ids": torch.arange(5)}

    def call():
        torch_op.route_options(x, weight, None, SCALE, TOP_K, *out, **given)
        return as_on_a_gpu.last["tid2eid"]

    address = call()
    [bound] = bound_layers.layers.values()
    given["tid2eid"].copy_(given["tid2eid"].flip(0).clone())
    as_on_a_gpu.capture = 1
    with pytest.raises(RouterError, match="being captured"):
        call()
    as_on_a_gpu.capture = 0
    if shown_by == "refresh":
        torch_op.refresh(weight)
    else:
        call()
    assert torch.equal(table_of(bound.router), given["tid2eid"].int())
    as_on_a_gpu.capture = 2
    assert call() == address
    assert list(bound_layers.layers.values()) == [bound]
    as_on_a_gpu.capture = 0
    given["tid2eid"].data.fill_(1)
    with pytest.raises(ValueError, match="tid2eid: expected distinct ids"):
        torch_op.refresh(weight)
    assert len(table_of(bound.router).unique()) > 1


def test_refresh_leaves_a_layer_that_moved_to_the_next_call(random):
    weight, _ = layer(random)
    x, tokens, tid2eid = rows(random), torch.arange(5), hash_table(random)
    given = {"tid2eid": tid2eid, "input_ids": tokens}
    torch_op.route_functional(x, weight, None, SCALE, TOP_K, **given)
    tid2eid.data = tid2eid.flip(0).contiguous()
    torch_op.refresh(weight)
    got = torch_op.route_functional(x, weight, None, SCALE, TOP_K, **given)
    check(got, x, weight, None, **given)


@pytest.mark.parametrize("hashed", [False, True])
def test_a_parameter_takes_its_layers_along(random, hashed):
    weight, e_bias = layer(random)
    given = {}
    if hashed:
        e_bias, given = None, {"tid2eid": hash_table(random), "input_ids": torch.arange(5)}
    torch_op.route_functional(rows(random), weight, e_bias, SCALE, TOP_K, **given)
    assert len(bound_layers.layers) == 1
    del weight
    gc.collect()
    assert not bound_layers.layers
    assert not bound_layers.plain_layers


@pytest.mark.slow
def test_views_made_for_a_call_find_the_layer_and_are_kept_up_to_a_number(random, monkeypatch):
    parameter, e_bias = layer(random)
    x = rows(random)
    made = []
    bound = bound_layers.CpuRouter
    monkeypatch.setattr(bound_layers, "CpuRouter", lambda *a, **k: made.append(0) or bound(*a, **k))
    for _ in range(3):
        weight = parameter.data.reshape(E, K)
        check(torch_op.route_functional(x, weight, e_bias, SCALE, TOP_K), x, weight, e_bias)
    assert len(made) == 1
    for number in range(MAX_REMEMBERED_LAYERS + 5):
        torch_op.route_functional(x, weight, e_bias, 1.0 + number, TOP_K)
    assert len(bound_layers.layers) == MAX_REMEMBERED_LAYERS
    assert len(bound_layers.plain_layers) == 1


def test_threads_bind_a_layer_once(random, monkeypatch):
    weight, e_bias = layer(random)
    x, made, kind = rows(random), [], bound_layers.CpuRouter

    def slow(*tensors, **options):
        made.append(threading.get_ident())
        time.sleep(0.05)
        return kind(*tensors, **options)

    monkeypatch.setattr(bound_layers, "CpuRouter", slow)
    with ThreadPoolExecutor(4) as pool:
        given = (x, weight, e_bias, SCALE, TOP_K)
        for got in [pool.submit(torch_op.route_functional, *given) for _ in range(8)]:
            check(got.result(), x, weight, e_bias)
    assert len(made) == 1


def test_on_a_gpu_the_layer_is_a_router_with_all_that_it_was_given(random, as_on_a_gpu):
    gpu = as_on_a_gpu
    weight, e_bias = layer(random)
    x, options, out = rows(random), all_options(random), outputs(5, TOP_K + 1)
    asked = optional_outputs()
    for _ in range(2):
        torch_op.route_options(x, weight, e_bias, SCALE, TOP_K, *out, **options, **asked, pdl=True)
        torch_op.route(x, weight, e_bias, SCALE, TOP_K, *out)
    assert len(gpu.launches) == 4
    assert gpu.pdl == [True, False]
    first, second = gpu.launches[:2]
    for name in (
        *("bias_vl", "to_physical", "logical_count", "image_mask", "padding_mask"),
        *("input_ids", "forced_ids", "forced_mask", "out_logical_ids", "out_logits"),
    ):
        assert first[name] == (options | asked)[name].data_ptr()
        assert second[name] == 0
    assert (first["first_image_id"], first["num_image_ids"]) == (3, 2)
    assert first["shared_weight"] == pytest.approx(0.4)
    assert first["num_valid_tokens"] == options["num_tokens"].data_ptr()
    for launch in (first, second):
        assert launch["e_bias"] == e_bias.data_ptr()
        assert launch["out_ids"] == out[1].data_ptr()
    assert {recipe.address for recipe in gpu.maps} >= {weight.data_ptr()}


# Without the dispatcher


WATCHERS = {
    "mode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "function mode": lambda: torch.device("cpu"),
    "transform": lambda: functorch.grad_increment_nesting(),
    "profiler": lambda: torch.autograd.profiler.profile(),
}


@pytest.fixture
def dispatched(monkeypatch):
    """Count the calls of `route` that reach its operator."""
    seen, operator = [], torch_op._route_operator
    monkeypatch.setattr(torch_op, "_route_operator", lambda *a: seen.append(a) or operator(*a))
    return seen


def test_a_call_with_a_bound_layer_needs_no_dispatcher(random, dispatched):
    weight, e_bias = layer(random)
    x, out = rows(random), outputs()
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            torch_op.route(x, weight, e_bias, SCALE, TOP_K, *out)
        assert len(dispatched) == 1
    check(out, x, weight, e_bias)


@pytest.mark.parametrize("watcher", WATCHERS.values(), ids=WATCHERS)
def test_who_watches_operators_sees_a_call_with_a_bound_layer(random, dispatched, watcher):
    weight, e_bias = layer(random)
    given = (rows(random), weight, e_bias, SCALE, TOP_K, *outputs())
    torch_op.route(*given)
    with watcher():
        torch_op.route(*given)
    assert len(dispatched) == 2


# pytest's first process would import torch for this warning's class.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_operator_of_a_bound_layer(random, dispatched):
    weight, e_bias = layer(random)
    given = (rows(random), weight, e_bias, SCALE, TOP_K)
    torch_op.route(*given, *outputs())

    def step(x):
        out = [x.new_empty(5, TOP_K, dtype=each) for each in (torch.float32, torch.int32)]
        torch_op.route(x, *given[1:], *out)
        return out

    traced = torch.jit.trace(step, given[0], check_trace=False).graph
    assert "dsv4_router::route" in str(traced)
    assert "dsv4_router.route" in make_fx(step)(given[0]).code


class Subclass(torch.Tensor):
    """A tensor with a dispatch of its own."""


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given | {"hidden_states": given["hidden_states"].as_subclass(Subclass)},
        lambda given: given | {"out_weights": given["out_weights"].as_subclass(Subclass)},
        lambda given: given | {"out_ids": given["out_ids"].as_subclass(Subclass)},
        lambda given: given | {"e_bias": given["e_bias"].as_subclass(Subclass)},
        lambda given: given | {"weight": given["weight"].data.as_subclass(Subclass)},
        lambda given: given | {"routed_scaling_factor": 2},
        lambda given: given | {"top_k": True},
    ],
)
def test_what_is_not_plain_takes_the_dispatcher(random, dispatched, change):
    weight, e_bias = layer(random)
    names = "hidden_states weight e_bias routed_scaling_factor top_k out_weights out_ids".split()
    given = dict(zip(names, (rows(random), weight, e_bias, 2.0, 1, *outputs()), strict=True))
    torch_op.route(**given)
    for _ in range(2):
        torch_op.route(**change(given))
    assert len(dispatched) == 3


# Under torch's tracers


def opcheck_cases(random, device="cpu"):
    weight, e_bias = layer(random, device)
    x, out = rows(random, device=device), outputs(device=device)
    plain = (x, weight, e_bias, SCALE, TOP_K)
    tid2eid, tokens = hash_table(random).to(device), torch.arange(5, device=device)
    yield torch.ops.dsv4_router.route.default, (*plain, *out), {}
    options = all_options(random, device)
    asked = optional_outputs(device=device)
    yield torch_op.route_options, (*plain, *outputs(5, TOP_K + 1, device=device)), options | asked
    hashed = (x, weight, None, SCALE, TOP_K)
    yield torch_op.route_options, (*hashed, *out), {"tid2eid": tid2eid, "input_ids": tokens}
    functional = torch.ops.dsv4_router.route_functional.default
    dtypes = {"ids_dtype": torch.int64, "weights_dtype": torch.bfloat16}
    yield functional, plain, {**options, **dtypes}


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", range(4))
def test_opcheck_passes(random, case):
    operator, arguments, options = list(opcheck_cases(random))[case]
    torch.library.opcheck(operator, arguments, options)


class Step(torch.nn.Module):
    """A piece of a model around the router, by the mutable operator or by its twin."""

    def __init__(self, weight, e_bias, functional: bool) -> None:
        super().__init__()
        self.weight, self.functional = weight, functional
        self.register_buffer("e_bias", e_bias)

    def forward(self, x, *out):
        given = (x, self.weight, self.e_bias, SCALE, TOP_K)
        if self.functional:
            return torch_op.route_functional(*given)
        if not out:
            shape = x.shape[0], TOP_K
            out = [x.new_empty(shape, dtype=dtype) for dtype in (torch.float32, torch.int32)]
        torch_op.route(*given, *out)
        return out


@pytest.fixture
def dynamo():
    from torch._dynamo import testing

    torch._dynamo.reset()
    yield testing
    torch._dynamo.reset()


each_operator = pytest.mark.parametrize("functional", [False, True], ids=["route", "functional"])


@pytest.mark.quick(1)
@each_operator
def test_compile_traces_one_graph_for_every_number_of_tokens(random, dynamo, functional):
    step = Step(*layer(random), functional)
    graphs = dynamo.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=graphs, fullgraph=True, dynamic=True)
    traced = []
    for num_tokens in (5, 8, 70):
        x = rows(random, num_tokens)
        check(compiled(x), x, step.weight, step.e_bias)
        # Dynamo starts over once, since the scale is a float: it traced an empty graph before.
        traced.append([graph for graph in graphs.graphs if len(graph.graph.nodes) > 1])
    assert [len(made) for made in traced] == [1, 1, 1]
    assert len(bound_layers.layers) == 1


def check_for_copies(step, *calls):
    """Compile a step with inductor; check its results, and its code for copies and kernels."""
    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    (code,) = run_and_get_code(compiled, *calls[0])[1]
    # Neither a copy, nor a kernel that inductor generates or calls.
    assert not re.findall(r"\.(?:copy_?|clone)\(|async_compile\.\w+\('|extern_kernels\.\w+\(", code)
    assert len(re.findall(r"^ +(?:buf\d+ = )?torch\.ops\.dsv4_router\.", code, re.M)) == 1, code
    for call in calls:
        check(compiled(*call), call[0], step.weight, step.e_bias)


@pytest.mark.slow
@each_operator
def test_inductor_adds_neither_a_copy_nor_a_kernel(random, dynamo, functional):
    step = Step(*layer(random), functional)
    check_for_copies(step, *((rows(random, num_tokens),) for num_tokens in (5, 70)))


@pytest.mark.slow
def test_inductor_adds_no_copy_of_the_callers_outputs(random, dynamo):
    step = Step(*layer(random), functional=False)
    check_for_copies(step, *((rows(random, number), *outputs(number)) for number in (5, 70)))


@each_operator
def test_export_lifts_the_weights(random, functional):
    step = Step(*layer(random), functional)
    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(step, (rows(random),), dynamic_shapes=({0: tokens},))
    assert exported.graph_signature.parameters == ("weight",)
    assert exported.graph_signature.buffers == ("e_bias",)
    loaded = exported.module()
    x = rows(random, 70)
    check(loaded(x), x, step.weight, step.e_bias)
    # The program's own weights are what is read.
    state = {"weight": step.weight.flip(1), "e_bias": step.e_bias.flip(0)}
    loaded.load_state_dict(state)
    check(loaded(x), x, state["weight"].contiguous(), state["e_bias"])


@pytest.mark.parametrize("trainable", ["hidden_states", "weight"])
@pytest.mark.parametrize("way", ["eager", "compiled", "exported"])
@each_operator
def test_a_gradient_is_refused_in_words(random, dynamo, trainable, way, functional):
    weight, e_bias = layer(random)
    x = rows(random)
    (x if trainable == "hidden_states" else weight).requires_grad_()
    step = Step(weight, e_bias, functional)
    run = {
        "compiled": torch.compile(step, backend="aot_eager", fullgraph=True),
        "exported": lambda x: torch.export.export(step, (x,)),
    }.get(way, step)
    words = f"{trainable}: expected a tensor that needs no gradient.*torch.no_grad"
    with pytest.raises(Exception, match=words):
        run(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            check(step(x), x, weight, e_bias)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(4))
def test_opcheck_passes_on_a_gpu(random, case):
    operator, arguments, options = list(opcheck_cases(random, "cuda"))[case]
    torch.library.opcheck(operator, arguments, options)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 200, 1000])
def test_all_operators_give_the_references_rows_on_a_gpu(random, num_tokens):
    weight, e_bias = layer(random, "cuda")
    x, options = rows(random, num_tokens, "cuda"), all_options(random, "cuda", num_tokens)
    out = outputs(num_tokens, device="cuda")
    torch_op.route(x, weight, e_bias, SCALE, TOP_K, *out)
    check(out, x, weight, e_bias)
    given = (x, weight, e_bias, SCALE, TOP_K)
    check(torch_op.route_functional(*given, **options), *given[:3], **options)
    out, asked = (
        outputs(num_tokens, TOP_K + 1, device="cuda"),
        optional_outputs(num_tokens, device="cuda"),
    )
    torch_op.route_options(*given, *out, **options, **asked)
    check(out, *given[:3], **options)
    check_optional(asked, *given[:3], **options)
    tid2eid = hash_table(random).cuda()
    hashed = {"tid2eid": tid2eid, "input_ids": torch.arange(num_tokens, device="cuda") % 10}
    out = outputs(num_tokens, ids_dtype=torch.int64, device="cuda")
    torch_op.route_options(x, weight, None, SCALE, TOP_K, *out, **hashed)
    check(out, x, weight, None, **hashed)


@pytest.mark.gpu
@each_operator
def test_inductor_adds_nothing_on_a_gpu(random, dynamo, functional):
    step = Step(*layer(random, "cuda"), functional)
    check_for_copies(step, *((rows(random, num_tokens, "cuda"),) for num_tokens in (5, 200, 1000)))


@pytest.mark.gpu
@each_operator
def test_a_captured_call_is_replayed_with_new_rows_and_weights(random, functional):
    step = Step(*layer(random, "cuda"), functional)
    x = rows(random, 8, "cuda")
    step(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x)
    for _ in range(2):
        x.copy_(rows(random, 8))
        step.weight.copy_(step.weight.flip(1))
        graph.replay()
        check(out, x, step.weight, step.e_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("shown_by", ["call", "refresh"])
def test_a_captured_hash_layer_is_replayed_with_new_tables(random, shown_by):
    weight, _ = layer(random, "cuda")
    x, tid2eid = rows(random, 8, "cuda"), hash_table(random).cuda()
    given = {"tid2eid": tid2eid, "input_ids": torch.arange(8, device="cuda")}

    def call():
        return torch_op.route_functional(x, weight, None, SCALE, TOP_K, **given)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(2):
        tid2eid.copy_(hash_table(random))
        weight.copy_(weight.flip(1))
        if shown_by == "call":
            call()
        else:
            torch_op.refresh(weight)
        graph.replay()
        check(out, x, weight, None, **given)


@pytest.mark.gpu
def test_an_exported_program_routes_on_a_gpu(random):
    step = Step(*layer(random, "cuda"), functional=True)
    tokens = torch.export.Dim("tokens")
    given = (rows(random, device="cuda"),)
    loaded = torch.export.export(step, given, dynamic_shapes=({0: tokens},)).module()
    x = rows(random, 70, "cuda")
    check(loaded(x), x, step.weight, step.e_bias)


@pytest.mark.gpu
@pytest.mark.timing
def test_an_eager_call_costs_little_more_than_a_routers(random):
    """The host's time of a call, the best of 30 rounds: at most 2.5 us more than Router's."""
    weight, e_bias = layer(random, "cuda")
    x, out = rows(random, 8, "cuda"), outputs(8, device="cuda")
    router = Router(weight.t(), e_bias, top_k=TOP_K, routed_scaling_factor=SCALE)
    calls = {
        "router": lambda: router(x, *out),
        "route": lambda: torch_op.route(x, weight, e_bias, SCALE, TOP_K, *out),
        "operator": lambda: torch.ops.dsv4_router.route.default(
            x, weight, e_bias, SCALE, TOP_K, *out
        ),
    }
    best = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        for _ in range(30):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(200):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / 200 * 1e6)
                torch.cuda.synchronize()
    print(best)
    # The dispatcher alone takes 1.8 us or more of the operator's time.
    assert best["route"] <= best["router"] + 2.5, best
