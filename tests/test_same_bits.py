"""`same_bits` without a GPU: calls of any N by fused kernels alone, in pieces beyond one launch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import torch
from conftest import sample_kernel, sample_manifest
from gpu_recorder import run_without_memory, sites_of

from dsv4_router_runtime import Router
from dsv4_router_runtime.__main__ import main
from dsv4_router_runtime.artifacts.dispatch import LayerProblem, plan_layer, without
from dsv4_router_runtime.artifacts.kernel import IntRange
from dsv4_router_runtime.artifacts.limits import MAX_TOKENS
from dsv4_router_runtime.device import launch_site, occupancy
from dsv4_router_runtime.device.launch import pieces_of
from dsv4_router_runtime.device.launch_site import LaunchSite, NoRoomError
from dsv4_router_runtime.errors import NoKernelError
from dsv4_router_runtime.explain import Question, as_json, as_text, explain
from dsv4_router_runtime.integrations import torch_op
from dsv4_router_runtime.integrations.bound_layers import bind_router
from dsv4_router_runtime.integrations.module import Gate, GateConfig

K, E, TOP_K = 128, 384, 6
PLAIN = LayerProblem(
    layout="kmajor", tma_loadable=True, hashed=False, num_experts=E, top_k=TOP_K, k=K
)
SAME = replace(PLAIN, same_bits=True)
LAST = plan_layer(sample_manifest(), SAME, "sm_90a").steps[-1]
TILE, PIECE = LAST.kernel.launch.token_tile, LAST.piece_tokens
QUESTION = Question(num_tokens=2 * PIECE + 1, k=K, num_experts=E, top_k=TOP_K, same_bits=True)


@pytest.fixture
def make(gpu, artifacts):
    def made(e=E, **more) -> Router:
        W, bias = torch.zeros(e, K, dtype=torch.bfloat16).t(), torch.zeros(e)
        given = {"top_k": TOP_K, "routed_scaling_factor": 2.5, "same_bits": True} | more
        return Router(W, None if "tid2eid" in more else bias, artifacts=artifacts, **given)

    return made


def step(num_tokens):
    x = torch.zeros(num_tokens, K, dtype=torch.bfloat16)
    return x, torch.zeros(num_tokens, TOP_K), torch.zeros(num_tokens, TOP_K, dtype=torch.int32)


def tiles_of(launch: dict) -> range:
    """Return the token tiles that a launch routes."""
    first, rest = divmod(launch["first_token"], TILE)
    assert rest == 0
    return range(first, first + launch["grid"][2])


# ------------------------------------------------------------------ the plan


@pytest.mark.parametrize("num_experts", [1, 128, 129, 256, 257, 384, 385, 512])
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_only_the_last_steps_are_others(manifest, num_experts, hashed, arch):
    plain = replace(PLAIN, num_experts=num_experts, hashed=hashed, has_bias_vl=True, top_k=1)
    before = plan_layer(manifest, plain, arch)
    plan = plan_layer(manifest, replace(plain, same_bits=True), arch)
    assert bool(plan.gate_steps) == hashed
    # Of up to 128 experts n64_k4 takes as many tokens.
    more = ["router_prefill_kmajor_n128_k4"] if num_experts > 128 else []
    for steps, others in ((plan.steps, before.steps), (plan.gate_steps, before.gate_steps)):
        if steps:
            *fused, last = steps
            shared = len(others) - 1
            assert tuple(fused[:shared]) == others[:-1]
            assert [step.kernel.name for step in fused[shared:]] == more
            assert last.kernel is fused[-1].kernel
            assert (fused[-1].piece_tokens, last.max_tokens) == (None, None)
            assert last.piece_tokens == fused[-1].max_tokens > 64
            assert last.piece_tokens % last.kernel.launch.token_tile == 0
    assert all(kernel.role != "select" for kernel in plan.kernels)
    assert plan == plan_layer(manifest, replace(plain, same_bits=True), arch)
    assert before == plan_layer(manifest, plain, arch)


def test_the_last_steps_reason_has_the_size_of_a_piece():
    assert LAST.reason == (
        f"{PIECE + 1}.. tokens: computes the whole gate in launches of {PIECE} tokens, one after "
        "the other, since a matrix product would give other bits"
    )


@pytest.mark.parametrize("hashed", [False, True])
def test_a_set_without_prefill_kernels_is_an_error(manifest, hashed):
    few = replace(manifest, kernels=tuple(k for k in manifest.kernels if k.role != "prefill"))
    layer = replace(SAME, hashed=hashed)
    expected = (
        r"^same_bits: expected a prefill kernel on sm_90a for more than 64 tokens \(got "
        r"router_decode_kmajor_n64.sm_90a, of role decode, .*build-kernels build"
    )
    with pytest.raises(NoKernelError, match=expected):
        plan_layer(few, layer, "sm_90a")
    assert plan_layer(few, replace(layer, same_bits=False), "sm_90a")


def taking(high: int | None, tile: int = TILE):
    """Return a manifest whose only prefill kernel takes `high` tokens, in tiles of `tile`."""
    kept = [each for each in sample_manifest().kernels if each.role != "prefill"]
    kernel = sample_kernel(LAST.kernel.name)
    problem = replace(kernel.problem, num_tokens=IntRange(low=1, high=high))
    launch = replace(kernel.launch, token_tile=tile, max_clusters=None)
    only = replace(kernel, problem=problem, launch=launch)
    return replace(sample_manifest(), kernels=(*kept, only))


def test_a_piece_is_whole_tiles():
    *_, fused, last = plan_layer(taking(4 * TILE + 5), SAME, "sm_90a").steps
    assert (fused.max_tokens, last.piece_tokens) == (4 * TILE + 5, 4 * TILE)
    with pytest.raises(NoKernelError, match=r"of role prefill, for tiles of 512, as the last"):
        plan_layer(taking(300, tile=512), SAME, "sm_90a")


def test_a_kernel_without_an_end_needs_no_pieces():
    last = plan_layer(taking(None), SAME, "sm_90a").steps[-1]
    assert (last.max_tokens, last.piece_tokens, last.kernel.role) == (None, None, "prefill")


def test_no_step_is_left_without_room_for_the_last(manifest):
    plan = plan_layer(manifest, SAME, "sm_90a")
    others = {key: "full" for step in plan.steps if (key := step.kernel.key) != LAST.kernel.key}
    assert {step.kernel for step in without(plan, others).steps} == {LAST.kernel}
    with pytest.raises(NoKernelError, match=f"{LAST.kernel.key}: full"):
        without(plan, {LAST.kernel.key: "full"})


def test_pieces_cover_every_token_once():
    pytest.importorskip("hypothesis", reason="draws the sizes")
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(deadline=None, derandomize=True)
    @given(
        tiles=st.integers(1, 30),
        tile=st.sampled_from([1, 8, 64, 128]),
        pieces=st.integers(0, 20),
        more=st.integers(0, 1 << 12),
    )
    def covered(tiles, tile, pieces, more):
        size = tiles * tile
        num_tokens = pieces * size + more
        made = list(pieces_of(num_tokens, size))
        assert [first for first, _ in made] == [at * size for at in range(len(made))]
        assert all(1 <= count <= size and first % tile == 0 for first, count in made)
        routed = [token for first, count in made for token in range(first, first + count)]
        assert routed == list(range(num_tokens))

    covered()


# ------------------------------------------------------------------ the launches


@pytest.mark.parametrize(
    ("num_tokens", "counts"),
    [
        (PIECE - 1, [PIECE - 1]),
        (PIECE, [PIECE]),
        (PIECE + 1, [PIECE, 1]),
        (2 * PIECE - TILE, [PIECE, PIECE - TILE]),
        (2 * PIECE, [PIECE, PIECE]),
        (2 * PIECE + 1, [PIECE, PIECE, 1]),
        (5 * PIECE + TILE + 1, [*5 * [PIECE], TILE + 1]),
    ],
)
@pytest.mark.parametrize("stream", [0, 2])
def test_a_call_is_one_launch_per_piece(gpu, make, num_tokens, counts, stream):
    gpu.stream = stream
    bound = make()
    x, weights, ids = step(num_tokens)
    bound(x, weights, ids)
    assert gpu.products == []
    assert [each["kernel"] for each in gpu.launches] == [LAST.kernel.key] * len(counts)
    assert [each["first_token"] for each in gpu.launches] == [
        PIECE * at for at in range(len(counts))
    ]
    assert [each["grid"][2] for each in gpu.launches] == [-(-count // TILE) for count in counts]
    tiles = [tile for launch in gpu.launches for tile in tiles_of(launch)]
    assert tiles == list(range(-(-num_tokens // TILE)))
    # All else is the whole call's, and the same scratch serves every piece.
    (rest,) = {
        tuple(sorted((name, value) for name, value in each.items() if name not in moving))
        for each in gpu.launches
        for moving in [("first_token", "grid")]
    }
    same = dict(rest)
    assert (same["num_tokens"], same["stream"]) == (num_tokens, stream)
    assert (same["out_weights"], same["out_ids"]) == (weights.data_ptr(), ids.data_ptr())
    assert (gpu.maps[-1].address, gpu.maps[-1].dims[1]) == (x.data_ptr(), num_tokens)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("capture", [0, 7])
def test_the_most_tokens_are_those_of_an_int32(gpu, make, monkeypatch, hashed, more, capture):
    table = {"tid2eid": torch.arange(TOP_K).repeat(9, 1), "bias_vl": torch.zeros(E)}
    bound = make(**(table if hashed else {}))
    n, gpu.capture = MAX_TOKENS + more, capture
    monkeypatch.setattr(launch_site, "pieces_of", lambda *given: iter([given]))
    if more:
        expected = rf"^hidden_states: expected at most {MAX_TOKENS} rows, .* \(got more\)"
        with pytest.raises(ValueError, match=expected):
            run_without_memory(bound, n)
        assert gpu.launches == []
    else:
        run_without_memory(bound, n)
        assert (gpu.last["num_tokens"], gpu.last["kernel"]) == (n, LAST.kernel.key)


def test_calls_of_other_sizes_on_one_site_have_their_own_pieces(gpu, make):
    bound = make()
    sizes = (3 * PIECE + 5, PIECE + 1, 2 * PIECE, PIECE + 1)
    for num_tokens in sizes:
        bound(*step(num_tokens))
    expected = [
        (first, -(-count // TILE), num_tokens)
        for num_tokens in sizes
        for first, count in pieces_of(num_tokens, PIECE)
    ]
    made = [(each["first_token"], each["grid"][2], each["num_tokens"]) for each in gpu.launches]
    assert made == expected
    assert len(sites_of(bound)) == 1
    bound(*step(PIECE))
    assert (gpu.last["first_token"], gpu.last["grid"][2]) == (0, PIECE // TILE)


def test_without_the_option_the_product_takes_over(gpu, make):
    bound = make(same_bits=False)
    bound(*step(PIECE + 1))
    assert len(gpu.products) == 1
    assert gpu.last["kernel"] == "router_topk.sm_90a"
    assert bound.kernels == (*make().kernels[:-1], "router_topk.sm_90a")


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("capture", [0, 7])
def test_every_piece_is_launched_as_the_call_is(gpu, make, pdl, capture):
    bound = make(pdl=not pdl)
    gpu.capture = capture
    bound(*step(2 * PIECE + 1), pdl=pdl)
    assert len(gpu.launches) == 3
    assert gpu.pdl == [pdl]


def test_options_and_outputs_of_a_call_reach_every_piece(gpu, make):
    n = 2 * PIECE + 7
    bound = make(bias_vl=torch.zeros(E))
    mask, logits = torch.zeros(n, dtype=torch.bool), torch.zeros(n, E)
    count = torch.zeros(1, dtype=torch.int32)
    given = {"image_mask": mask, "padding_mask": mask, "num_tokens": count, "out_logits": logits}
    bound(*step(n), **given)
    expected = {
        "image_mask": mask.data_ptr(),
        "padding_mask": mask.data_ptr(),
        "num_valid_tokens": count.data_ptr(),
        "out_logits": logits.data_ptr(),
        "out_logits_stride": E,
        "bias_vl": bound.bias_vl.data_ptr(),
    }
    assert len(gpu.launches) == 3
    for launch in gpu.launches:
        assert {name: launch[name] for name in expected} == expected
    assert gpu.products == []


@pytest.mark.parametrize("images", [False, True])
def test_a_hash_layer_is_routed_in_pieces_too(gpu, make, images):
    table = torch.arange(TOP_K).repeat(9, 1)
    bound = make(tid2eid=table, bias_vl=torch.zeros(E))
    n = PIECE + 1
    mask = torch.zeros(n, dtype=torch.bool) if images else None
    bound(*step(n), input_ids=torch.zeros(n, dtype=torch.int32), image_mask=mask)
    assert [each["first_token"] for each in gpu.launches] == [0, PIECE]
    assert all(each["tid2eid"] for each in gpu.launches)
    assert gpu.products == []


def test_an_interrupted_call_leaves_the_next_one_right(gpu, make, monkeypatch):
    bound = make()
    bound(*step(2 * PIECE))
    with monkeypatch.context() as patch:

        def interrupted(site):
            if site.block.cells["first_token"].value:
                raise KeyboardInterrupt
            gpu.note(site)

        patch.setattr(LaunchSite, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bound(*step(2 * PIECE + 1))
    gpu.launches.clear()
    bound(*step(PIECE + 1))
    made = [(each["first_token"], each["grid"][2]) for each in gpu.launches]
    assert made == [(0, PIECE // TILE), (PIECE, 1)]


def test_an_interrupted_change_of_the_grid_leaves_the_next_call_right(gpu, make, monkeypatch):
    bound = make()
    bound(*step(PIECE - TILE))
    before, set_grid = gpu.last["grid"], LaunchSite.set_grid
    with monkeypatch.context() as patch:

        def interrupted(site, grid):
            set_grid(site, grid)
            raise KeyboardInterrupt

        patch.setattr(LaunchSite, "set_grid", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bound(*step(PIECE))
    bound(*step(PIECE - TILE))
    assert gpu.last["grid"] == before


# ------------------------------------------------------------------ room and errors


@pytest.mark.parametrize("capture", [0, 7])
@pytest.mark.parametrize("num_tokens", [5, PIECE, PIECE + 1])
def test_a_context_without_room_for_the_last_kernel_is_an_error(gpu, make, num_tokens, capture):
    bound = make()
    gpu.capture = capture
    gpu.unfit = dict.fromkeys(bound.kernels, "no room for a cluster")
    expected = (
        rf"^{LAST.kernel.key}, the last step of this layer: no room for a cluster; without "
        r"same_bits, torch.mm and router_topk take such calls$"
    )
    with pytest.raises(NoKernelError, match=expected):
        bound(*step(num_tokens))
    assert gpu.launches == gpu.products == []


@pytest.mark.parametrize(("num_tokens", "launches"), [(5, 1), (PIECE, 1), (PIECE + 1, 2)])
def test_the_last_kernel_serves_what_the_others_have_no_room_for(gpu, make, num_tokens, launches):
    bound = make()
    gpu.unfit = dict.fromkeys(bound.kernels[:-1], "no room")
    bound(*step(num_tokens))
    assert [each["kernel"] for each in gpu.launches] == [LAST.kernel.key] * launches
    assert gpu.last["grid"][2] == -(-(num_tokens % PIECE or PIECE) // TILE)
    # Each names the kernel that is launched, not the next one, which has no room either.
    noted = {each.kernel: each.instead for each in occupancy.fallbacks()}
    assert set(noted.values()) <= {LAST.kernel.key}
    assert set(noted) <= set(bound.kernels[:-1])
    assert len(noted) == (len(bound.kernels) - 1 if num_tokens == 5 else 0)


def test_a_refused_fallback_takes_the_step_after_its_own(gpu, make, monkeypatch):
    bound = make()
    first, second, third, *_ = bound.kernels
    gpu.unfit = {first: "no room"}
    bound(*step(5))
    assert gpu.last["kernel"] == second
    tries = []

    def refused(site):
        tries.append(site.block.kernel.key)
        assert len(tries) < 9, "the same launch is tried for ever"
        if tries[-1] == second:
            raise NoRoomError(site.loaded)
        gpu.note(site)

    monkeypatch.setattr(LaunchSite, "launch", refused)
    bound(*step(5))
    assert (tries, gpu.last["kernel"]) == ([second, third], third)
    noted = {each.kernel: each.instead for each in occupancy.fallbacks()}
    assert noted == {first: second, second: third}


@pytest.mark.parametrize("given", [1, None, "yes"])
@pytest.mark.parametrize("bind", [Router, bind_router])
def test_it_is_a_bool(gpu, bind, given):
    weight = torch.zeros(E, K, dtype=torch.bfloat16)
    W = weight.t() if bind is Router else weight
    more = {"top_k": TOP_K, "routed_scaling_factor": 1.0, "same_bits": given}
    expected = rf"^same_bits: expected a bool \(got {type(given).__name__}\)"
    with pytest.raises(TypeError, match=expected):
        bind(W, torch.zeros(E), **more)


# ------------------------------------------------------------------ explain and adapters


def test_explain_says_how_many_launches_of_how_many_tokens(artifacts):
    explained = explain(artifacts, QUESTION, "sm_90a")
    text, document = as_text(explained), as_json(explained)
    assert "same bits on sm_90a\n" in text
    assert f"path: 3 launches, the largest ({PIECE} tokens) of {LAST.kernel.key}, " in text
    assert f"-> {LAST.reason}: {LAST.kernel.key}" in text
    assert "without room for a cluster of 4 CTAs (MIG, MPS, green contexts): NoKernelError" in text
    assert f"{LAST.kernel.key}: chosen" in text
    assert "router_topk.sm_90a: accepted" not in text
    assert (document["launches"], document["kernel_without_clusters"]) == (3, None)
    assert document["grid"][2] == PIECE // TILE
    assert [each["piece_tokens"] for each in document["steps"][-2:]] == [None, PIECE]
    one = as_json(explain(artifacts, replace(QUESTION, num_tokens=PIECE), "sm_90a"))
    assert (one["launches"], one["grid"]) == (1, document["grid"])
    assert document["capture_bytes"] == one["capture_bytes"]


def test_the_command_takes_it(write_artifacts, manifest, capsys):
    numbers = f"--n {QUESTION.num_tokens} --k {K} --experts {E} --top-k {TOP_K} --arch sm_90a"
    folder = write_artifacts(manifest)
    arguments = ["explain", *numbers.split(), "--artifacts", str(folder), "--json"]
    launches = []
    for more in ([], ["--same-bits"]):
        assert main([*arguments, *more]) == 0
        launches.append(json.loads(capsys.readouterr().out)["launches"])
    assert launches == [2, 3]


@pytest.mark.usefixtures("nothing_bound")
def test_operators_and_the_module_bind_with_it(monkeypatch):
    given = []

    def recorded(*tensors, **bound):
        given.append(bound)
        return bind_router(*tensors, **bound)

    monkeypatch.setattr("dsv4_router_runtime.integrations.bound_layers.bind_router", recorded)
    weight, bias = torch.zeros(8, K, dtype=torch.bfloat16), torch.zeros(8)
    x = torch.zeros(3, K, dtype=torch.bfloat16)
    form = {"hidden_size": K, "num_experts": 8, "top_k": 2, "routed_scaling_factor": 1.0}
    for more in ({}, {"same_bits": True}):
        torch_op.route_functional(x, weight, bias, 1.0, 2, **more)
        gate = Gate(GateConfig(**form, **more))
        gate.weight.data.zero_()
        gate(x)
    assert [each.get("same_bits", False) for each in given] == [False, False, True, True]
