"""Which kernel runs what, and what is said when none does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import decode_kernel, sample_kernel, topk_kernel
from watchdog import ends_within

from dsv4_router_runtime.artifacts.dispatch import (
    Accepted,
    LayerProblem,
    Problem,
    Rejected,
    device_arch,
    judge,
    plan_layer,
    resolve,
    runs_on,
    select_kernel,
    without,
)
from dsv4_router_runtime.artifacts.kernel import IntRange
from dsv4_router_runtime.artifacts.limits import MAX_TOKENS
from dsv4_router_runtime.artifacts.manifest import Manifest
from dsv4_router_runtime.errors import NoKernelError


@pytest.fixture(params=["ascending", "descending", "mixed"])
def manifest(request, manifest):
    """The sample in several orders: the answer is the kernels' own, not their place's."""
    kernels = list(manifest.kernels)
    if request.param == "descending":
        kernels.reverse()
    elif request.param == "mixed":
        kernels = kernels[3::2] + kernels[::2] + kernels[1:3:2]
    return replace(manifest, kernels=tuple(kernels))


PROBLEM = Problem(role="decode", layout="kmajor", num_tokens=1, num_experts=384, top_k=6, k=7168)


@pytest.mark.parametrize(
    ("num_tokens", "role", "layout", "name"),
    [
        (1, "decode", "kmajor", "router_decode_kmajor_n8"),
        (8, "decode", "kmajor", "router_decode_kmajor_n8"),
        (9, "decode", "kmajor", "router_decode_kmajor_n32"),
        (32, "decode", "emajor", "router_decode_emajor_n32"),
        (33, "decode", "kmajor", "router_decode_kmajor_n64"),
        (64, "decode", "emajor", "router_decode_emajor_n64"),
        (1, "hash", "kmajor", "router_hash"),
        (56, "hash", "kmajor", "router_hash"),
        (1, "prefill", "kmajor", "router_prefill_kmajor_n64"),
        (128, "prefill", "emajor", "router_prefill_emajor_n64"),
        (129, "prefill", "kmajor", "router_prefill_kmajor_n64_k8"),
        (320, "prefill", "emajor", "router_prefill_emajor_n64_k8"),
        (65, "select", None, "router_topk"),
        (1, "select", None, "router_topk"),
    ],
)
def test_smallest_kernel_that_fits(manifest, num_tokens, role, layout, name):
    problem = replace(PROBLEM, num_tokens=num_tokens, role=role, layout=layout)
    kernel = select_kernel(manifest, problem, "sm_100a")
    assert kernel.key == f"{name}.sm_100a"


def test_every_kernel_gets_an_answer(manifest):
    answers = resolve(manifest, PROBLEM, "sm_90a")
    assert [answer.kernel for answer in answers] == list(manifest.kernels)
    accepted = {a.kernel.key for a in answers if isinstance(a, Accepted)}
    assert accepted == {f"router_decode_kmajor_n{tile}.sm_90a" for tile in (8, 32, 64)}
    assert all(a.reason for a in answers if isinstance(a, Rejected))


@pytest.mark.parametrize(
    ("difference", "reason"),
    [
        ({"num_tokens": 17}, "takes num_tokens 1..8, got 17"),
        ({"num_experts": 513}, "takes num_experts 1..512, got 513"),
        ({"top_k": 9}, "takes top_k 1..8, got 9"),
        ({"k": 7000}, "takes K in multiples of 64, got 7000"),
        ({"layout": "emajor"}, "reads layout kmajor, W_gate is emajor"),
        ({"role": "select"}, "its role is decode, this step needs select"),
        ({"dtypes": {"out_ids": ("int64", "int8")}}, "takes out_ids in int32 or int64, got int8"),
        ({"dtypes": {"W_gate": ("float16",)}}, "takes W_gate in bfloat16, got float16"),
    ],
)
def test_reasons(manifest, difference, reason):
    answers = resolve(manifest, replace(PROBLEM, **difference), "sm_90a")
    by_key = {answer.kernel.key: answer for answer in answers}
    assert by_key["router_decode_kmajor_n8.sm_90a"].reason == reason


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "reason"),
    [
        (129, 384, "takes at most 7 clusters, which are 128 tokens of 384 experts, got 129"),
        (65, 385, "takes at most 7 clusters, which are 64 tokens of 385 experts, got 65"),
        # The range of tokens comes first: no number of experts takes more.
        (449, 128, "takes num_tokens 1..448, got 449"),
    ],
)
def test_a_kernel_takes_no_more_tokens_than_its_clusters(manifest, num_tokens, num_experts, reason):
    problem = replace(PROBLEM, role="prefill", num_tokens=num_tokens, num_experts=num_experts)
    kernel = sample_kernel("router_prefill_kmajor_n64")
    assert judge(kernel, problem, "sm_90a") == Rejected(kernel=kernel, reason=reason)
    fewer = replace(problem, num_tokens=num_tokens - 1)
    assert judge(kernel, fewer, "sm_90a") == Accepted(kernel=kernel)
    others = ("_k8", "_k4")
    without_larger = tuple(
        item for item in manifest.kernels if not any(word in item.name for word in others)
    )
    with pytest.raises(NoKernelError, match=f"router_prefill_kmajor_n64.sm_90a: {reason}"):
        select_kernel(replace(manifest, kernels=without_larger), problem, "sm_90a")


def test_the_most_tokens_of_a_kernel():
    """By its range, and by whole tiles of experts in its clusters; the smaller counts."""
    prefill, decode = sample_kernel("router_prefill_kmajor_n64_k8"), decode_kernel()
    experts = (1, 128, 129, 256, 257, 384, 385, 512)
    most = [prefill.most_tokens(number) for number in experts]
    assert most == [960, 960, 448, 448, 320, 320, 192, 192]
    assert [decode.most_tokens(number) for number in experts] == [8] * 8
    assert topk_kernel().most_tokens(384) is None
    endless = replace(prefill.problem, num_tokens=IntRange(low=1, high=None))
    assert replace(prefill, problem=endless).most_tokens(384) == 320
    unbounded = replace(prefill.launch, max_clusters=None)
    assert replace(prefill, launch=unbounded).most_tokens(384) == 960
    assert replace(prefill, launch=unbounded, problem=endless).most_tokens(384) is None
    short = replace(prefill, problem=replace(prefill.problem, num_tokens=IntRange(low=1, high=500)))
    assert [short.most_tokens(number) for number in (128, 256)] == [500, 448]
    few = replace(prefill, launch=replace(prefill.launch, max_clusters=3))
    # Not even one token tile of four tiles of experts.
    assert (few.most_tokens(384), few.most_tokens(385)) == (64, 0)


def test_dtypes_a_kernel_does_not_mention_are_not_compared(manifest):
    problem = replace(PROBLEM, dtypes={"logits": ("float16",), "W_gate": ("bfloat16",)})
    assert select_kernel(manifest, problem, "sm_90a").name == "router_decode_kmajor_n8"


def test_no_kernel_lists_every_candidate(manifest):
    with pytest.raises(NoKernelError) as caught:
        select_kernel(manifest, PROBLEM, "sm_103a")
    message = str(caught.value)
    for kernel in manifest.kernels:
        assert f"{kernel.key}: built for {kernel.arch}, this GPU is sm_103a" in message
    assert "role=decode, num_tokens=1, K=7168, num_experts=384" in message
    assert "top_k=6, layout=kmajor on sm_103a" in message
    assert "`build-kernels build --arch sm_103a`" in message


def test_no_kernels_at_all():
    empty = Manifest(toolchain={}, driver={}, kernels=())
    with pytest.raises(NoKernelError, match="the manifest lists no kernels"):
        select_kernel(empty, PROBLEM, "sm_90a")


@pytest.mark.parametrize(
    ("built_for", "device", "runs"),
    [
        ("sm_100a", "sm_100a", True),
        ("sm_100a", "sm_103a", False),
        ("sm_103a", "sm_100a", False),
        ("sm_90a", "sm_100a", False),
        ("sm_100f", "sm_103a", True),
        ("sm_103f", "sm_100a", False),
        ("sm_100f", "sm_120a", False),
        ("sm_90", "sm_90a", True),
        ("sm_86", "sm_89", True),
        ("sm_89", "sm_86", False),
    ],
)
def test_which_targets_run_where(built_for, device, runs):
    assert runs_on(built_for, device) is runs


@pytest.mark.parametrize(
    ("device", "built_for"),
    [("sm_100a", "sm_100a"), ("sm_103a", "sm_103a"), ("sm_101a", "sm_100f")],
)
def test_a_familys_kernel_serves_where_no_other_does(device, built_for):
    kernels = tuple(topk_kernel(arch) for arch in ("sm_100f", "sm_103a", "sm_100a", "sm_90a"))
    wanted = replace(PROBLEM, role="select", layout=None)
    for ordered in (kernels, kernels[::-1]):
        found = Manifest(toolchain={}, driver={}, kernels=ordered)
        assert select_kernel(found, wanted, device).arch == built_for


@pytest.mark.parametrize(
    ("capability", "arch"), [((9, 0), "sm_90a"), ((10, 3), "sm_103a"), ((8, 9), "sm_89")]
)
def test_device_arch(capability, arch):
    assert device_arch(*capability) == arch


LAYER = LayerProblem(
    layout="kmajor", tma_loadable=True, hashed=False, num_experts=384, top_k=6, k=7168
)


# Of a K-contiguous gate of 384 experts.
PREFILL_STEPS = (
    (128, "router_prefill_kmajor_n64"),
    (320, "router_prefill_kmajor_n64_k8"),
    (640, "router_prefill_kmajor_n64_k4"),
)


def steps(manifest, layer=LAYER, arch="sm_90a"):
    return [(step.max_tokens, step.kernel.name) for step in plan_layer(manifest, layer, arch).steps]


def test_a_plain_layers_steps(manifest):
    assert steps(manifest) == [
        (8, "router_decode_kmajor_n8"),
        (32, "router_decode_kmajor_n32"),
        (64, "router_decode_kmajor_n64"),
        *PREFILL_STEPS,
        (None, "router_topk"),
    ]
    plan = plan_layer(manifest, LAYER, "sm_90a")
    assert [step.is_product_and_select for step in plan.steps] == [*[False] * 6, True]
    assert [step.reason for step in plan.steps[2:]] == [
        "33..64 tokens: computes the whole gate in one launch",
        "65..128 tokens: computes the whole gate in one launch, by larger tiles",
        "129..320 tokens: computes the whole gate in one launch, by larger tiles",
        "321..640 tokens: computes the whole gate in one launch, by larger tiles",
        "641.. tokens: selects from the logits of a matrix product",
    ]
    assert plan.copy_reason is None


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
@pytest.mark.parametrize(
    ("num_experts", "ends"),
    [
        (60, {"n64": 448, "n64_k8": 960, "n64_k4": 1920}),
        (128, {"n64": 448, "n64_k8": 960, "n64_k4": 1920}),
        (129, {"n64": 192, "n64_k8": 448, "n64_k4": 960}),
        (130, {"n64": 192, "n64_k8": 448, "n64_k4": 960}),
        (256, {"n64": 192, "n64_k8": 448, "n64_k4": 960}),
        (257, {"n64": 128, "n64_k8": 320, "n64_k4": 640}),
        (384, {"n64": 128, "n64_k8": 320, "n64_k4": 640}),
        # One token tile of 64 is decode's; n64 stands in where that takes more waves.
        (385, {"n64": 64, "n64_k8": 192, "n64_k4": 448}),
        (512, {"n64": 64, "n64_k8": 192, "n64_k4": 448}),
    ],
)
def test_prefill_serves_what_fits_in_its_clusters(manifest, layout, num_experts, ends):
    # K-contiguous, or with rows that TMA can step by: W_gate is read in place.
    layer = replace(LAYER, layout=layout, num_experts=num_experts)
    assert steps(manifest, layer)[3:] == [
        *((end, f"router_prefill_{layout}_{tile}") for tile, end in ends.items()),
        (None, "router_topk"),
    ]


def test_a_stand_in_says_when_it_is_taken(manifest):
    plan = plan_layer(manifest, replace(LAYER, num_experts=512), "sm_90a")
    assert [step.reason for step in plan.steps[2:5]] == [
        "33..64 tokens: computes the whole gate in one launch",
        "..64 tokens, if that takes fewer waves of clusters: computes the whole gate in one "
        "launch, by larger tiles",
        "65..192 tokens: computes the whole gate in one launch, by larger tiles",
    ]


def test_a_set_without_prefill_kernels_multiplies_beyond_decode(manifest):
    few = tuple(kernel for kernel in manifest.kernels if kernel.role != "prefill")
    manifest = replace(manifest, kernels=few)
    assert steps(manifest)[2:] == [(64, "router_decode_kmajor_n64"), (None, "router_topk")]
    assert steps(manifest, replace(LAYER, hashed=True)) == [
        (56, "router_hash"),
        (64, "router_decode_kmajor_n64"),
        (None, "router_topk"),
    ]


@pytest.mark.parametrize(("end", "name"), PREFILL_STEPS)
def test_a_set_with_one_prefill_kernel_serves_what_that_takes(manifest, end, name):
    few = [item for item in manifest.kernels if item.role != "prefill" or item.name == name]
    assert steps(replace(manifest, kernels=tuple(few)))[3:] == [(end, name), (None, "router_topk")]


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
@pytest.mark.parametrize(
    ("num_experts", "ends"),
    [
        # n128_k4 takes no more tokens than n64_k4.
        (128, {"n64_k8": 960, "n64_k4": 1920}),
        (256, {"n64_k8": 448, "n64_k4": 960, "n128_k4": 1920}),
        (384, {"n64_k8": 320, "n64_k4": 640, "n128_k4": 1280}),
        (512, {"n64_k8": 192, "n64_k4": 448, "n128_k4": 896}),
    ],
)
def test_one_kernel_serves_same_bits_alone(manifest, layout, num_experts, ends):
    layer = replace(LAYER, layout=layout, num_experts=num_experts, same_bits=True)
    *fused, last = plan_layer(manifest, layer, "sm_90a").steps
    assert [(step.kernel.name, step.max_tokens) for step in fused[-len(ends) :]] == [
        (f"router_prefill_{layout}_{tile}", end) for tile, end in ends.items()
    ]
    assert (last.kernel, last.piece_tokens) == (fused[-1].kernel, fused[-1].max_tokens)
    kernel = sample_kernel(f"router_prefill_{layout}_n128_k4")
    problem = replace(PROBLEM, role="prefill", layout=layout, num_experts=num_experts)
    reason = "slower than a matrix product; it serves layers that ask for same_bits"
    assert judge(kernel, problem, "sm_90a") == Rejected(kernel=kernel, reason=reason)
    assert isinstance(judge(kernel, replace(problem, same_bits=True), "sm_90a"), Accepted)


def test_a_hash_layer_goes_on_with_the_whole_gate(manifest):
    assert steps(manifest, replace(LAYER, hashed=True)) == [
        (56, "router_hash"),
        (64, "router_decode_kmajor_n64"),
        *PREFILL_STEPS,
        (None, "router_topk"),
    ]


def test_a_hash_layers_calls_with_images_take_the_whole_gate(manifest):
    plain = plan_layer(manifest, LAYER, "sm_90a")
    hashed = plan_layer(manifest, replace(LAYER, hashed=True), "sm_90a")
    mixed = plan_layer(manifest, replace(LAYER, hashed=True, has_bias_vl=True), "sm_90a")
    assert (mixed.steps, mixed.gate_steps) == (hashed.steps, plain.steps)
    assert (mixed.steps_of(whole_gate=False), mixed.steps_of(whole_gate=True)) == (
        mixed.steps,
        mixed.gate_steps,
    )
    assert [kernel.name for kernel in mixed.kernels] == [
        "router_hash",
        "router_decode_kmajor_n64",
        *(name for _, name in PREFILL_STEPS),
        "router_topk",
        "router_decode_kmajor_n8",
        "router_decode_kmajor_n32",
    ]
    # No other layer has two kinds of calls.
    assert plan_layer(manifest, replace(LAYER, has_bias_vl=True), "sm_90a") == plain
    assert hashed.steps_of(whole_gate=True) == hashed.steps


def test_gate_steps_lose_the_kernels_that_do_not_fit_too(manifest):
    plan = plan_layer(manifest, replace(LAYER, hashed=True, has_bias_vl=True), "sm_90a")
    unfit = {kernel.key: "full" for kernel in plan.kernels if kernel.role != "select"}
    left = without(plan, unfit)
    assert left.steps == plan.steps[-1:]
    assert left.gate_steps == plan.gate_steps[-1:]
    assert {item.kernel.key: item.reason for item in left.rejected} == unfit


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"layout": "emajor"}, None),
        ({"layout": "emajor", "hashed": True}, "a hash layer reads an expert as one row of W_gate"),
        ({"layout": "emajor", "tma_loadable": False}, "no multiple of 16 bytes"),
    ],
)
def test_a_copy_of_w_gate_has_a_reason(manifest, layer, reason):
    plan = plan_layer(manifest, replace(LAYER, **layer), "sm_90a")
    layouts = {step.kernel.problem.layout for step in plan.steps}
    if reason is None:
        assert (plan.copy_reason, layouts) == (None, {"emajor", None})
    else:
        assert reason in plan.copy_reason
        assert layouts == {"kmajor", None}


def test_a_step_before_a_gap_hands_over_to_the_next_role(manifest, change):
    for at, kernel in enumerate(manifest.kernels):
        if kernel.name == "router_decode_kmajor_n32":
            late = replace(kernel.problem, num_tokens=IntRange(low=10, high=32))
            manifest = change(manifest, at, problem=late)
        if kernel.name == "router_decode_kmajor_n64":
            late = replace(kernel.problem, num_tokens=IntRange(low=33, high=64))
            manifest = change(manifest, at, problem=late)
    assert steps(manifest) == [
        (8, "router_decode_kmajor_n8"),
        *PREFILL_STEPS,
        (None, "router_topk"),
    ]
    few = tuple(kernel for kernel in manifest.kernels if kernel.role != "prefill")
    assert steps(replace(manifest, kernels=few)) == [
        (8, "router_decode_kmajor_n8"),
        (None, "router_topk"),
    ]


@pytest.mark.parametrize("is_prefill_there", [True, False])
def test_a_hash_layer_hands_over_a_gap_to_the_next_role_too(manifest, is_prefill_there):
    few = [kernel for kernel in manifest.kernels if "decode_kmajor_n64" not in kernel.name]
    few = [kernel for kernel in few if is_prefill_there or kernel.role != "prefill"]
    assert steps(replace(manifest, kernels=tuple(few)), replace(LAYER, hashed=True)) == [
        (56, "router_hash"),
        *(PREFILL_STEPS if is_prefill_there else []),
        (None, "router_topk"),
    ]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("decode", "no kernel for role=decode, num_tokens=1"),
        ("select", "no kernel for role=select, num_tokens=641"),
    ],
)
def test_a_layer_that_no_kernels_serve_is_refused(manifest, missing, message):
    kernels = tuple(kernel for kernel in manifest.kernels if kernel.role != missing)
    with pytest.raises(NoKernelError, match=message):
        plan_layer(replace(manifest, kernels=kernels), LAYER, "sm_90a")


def test_a_product_that_ends_is_refused(manifest, change):
    for at, kernel in enumerate(manifest.kernels):
        if kernel.role == "select":
            short = replace(kernel.problem, num_tokens=IntRange(low=1, high=4096))
            manifest = change(manifest, at, problem=short)
    with pytest.raises(NoKernelError, match="no kernel for more than 4096 tokens on sm_90a"):
        plan_layer(manifest, LAYER, "sm_90a")


def taking(*ranges) -> Manifest:
    """Decode kernels of these ranges of tokens, whatever a manifest's text would be allowed."""
    kernels = []
    for at, (low, high) in enumerate(ranges):
        kernel = decode_kernel()
        problem = replace(kernel.problem, num_tokens=IntRange(low=low, high=high))
        kernels.append(replace(kernel, name=f"decode_{at}", problem=problem))
    return Manifest(toolchain={}, driver={}, kernels=(*kernels, topk_kernel()))


@pytest.mark.parametrize(
    ("ranges", "ends"),
    [
        ([(1, None)], [None]),
        ([(1, 8), (9, None)], [8, None]),
        ([(1, None), (1, None)], [None]),
        ([(1, 8), (1, 2**40)], [8, None]),
        ([(1, MAX_TOKENS), (1, None), (MAX_TOKENS + 1, 2**62)], [None]),
        # Overlapping, the same twice, backward, and beyond a gap.
        ([(1, 8), (4, 16), (4, 16), (2, 12)], [8, 12, 16, None]),
        ([(1, 8), (16, 9), (12, 10)], [8, None]),
        ([(1, 8), (10, 64)], [8, None]),
    ],
)
def test_a_plan_ends_whatever_the_ranges_are(ranges, ends):
    with ends_within(5):
        plan = plan_layer(taking(*ranges), LAYER, "sm_90a")
    assert [step.max_tokens for step in plan.steps] == ends


def test_a_refusal_by_a_thousand_kernels_stays_a_message():
    with pytest.raises(NoKernelError, match=r"\.\.\. and 937 more") as caught:
        select_kernel(taking(*[(1, 8)] * 1000), PROBLEM, "sm_100a")
    assert str(caught.value).count("built for sm_90a, this GPU is sm_100a") == 64
    assert len(str(caught.value)) < 8000
