"""Which kernel runs what, and what is said when none does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import decode_kernel
from watchdog import ends_within

from dsv4_router_runtime.artifacts.dispatch import (
    Accepted,
    Problem,
    Rejected,
    decode_ladder,
    device_arch,
    resolve,
    runs_on,
    select_kernel,
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


PROBLEM = Problem(layout="kmajor", num_tokens=1, num_experts=384, top_k=6, k=7168)


@pytest.mark.parametrize(
    ("num_tokens", "layout", "name"),
    [
        (1, "kmajor", "router_decode_kmajor_n8"),
        (8, "kmajor", "router_decode_kmajor_n8"),
        (9, "kmajor", "router_decode_kmajor_n32"),
        (32, "emajor", "router_decode_emajor_n32"),
        (33, "kmajor", "router_decode_kmajor_n64"),
        (64, "emajor", "router_decode_emajor_n64"),
        (1, "kmajor_rows", "router_hash"),
        (56, "kmajor_rows", "router_hash"),
        (65, "logits", "router_topk"),
        (1, "logits", "router_topk"),
    ],
)
def test_smallest_kernel_that_fits(manifest, num_tokens, layout, name):
    problem = replace(PROBLEM, num_tokens=num_tokens, layout=layout)
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
        ({"layout": "emajor"}, "reads layout kmajor, this problem is emajor"),
        ({"dtypes": {"out_ids": ("int64", "int8")}}, "takes out_ids in int32 or int64, got int8"),
        ({"dtypes": {"W_gate": ("float16",)}}, "takes W_gate in bfloat16, got float16"),
    ],
)
def test_reasons(manifest, difference, reason):
    answers = resolve(manifest, replace(PROBLEM, **difference), "sm_90a")
    by_key = {answer.kernel.key: answer for answer in answers}
    assert by_key["router_decode_kmajor_n8.sm_90a"].reason == reason


def test_dtypes_a_kernel_does_not_mention_are_not_compared(manifest):
    problem = replace(PROBLEM, dtypes={"logits": ("float16",), "W_gate": ("bfloat16",)})
    assert select_kernel(manifest, problem, "sm_90a").name == "router_decode_kmajor_n8"


def test_no_kernel_lists_every_candidate(manifest):
    with pytest.raises(NoKernelError) as caught:
        select_kernel(manifest, PROBLEM, "sm_103a")
    message = str(caught.value)
    for kernel in manifest.kernels:
        assert f"{kernel.key}: built for {kernel.arch}, this GPU is sm_103a" in message
    assert "num_tokens=1, K=7168, num_experts=384, top_k=6, layout=kmajor on sm_103a" in message
    assert "`build-kernels build --arch sm_103a`" in message


def test_no_kernels_at_all():
    empty = Manifest(toolchain={}, kernels=())
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
    ("capability", "arch"), [((9, 0), "sm_90a"), ((10, 3), "sm_103a"), ((8, 9), "sm_89")]
)
def test_device_arch(capability, arch):
    assert device_arch(*capability) == arch


def test_ladder(manifest):
    ladder = decode_ladder(manifest, PROBLEM, "sm_90a")
    assert [(most, kernel.key) for most, kernel in ladder] == [
        (8, "router_decode_kmajor_n8.sm_90a"),
        (32, "router_decode_kmajor_n32.sm_90a"),
        (64, "router_decode_kmajor_n64.sm_90a"),
    ]


def test_ladder_with_a_gap_stops_before_it(manifest, change):
    for at, kernel in enumerate(manifest.kernels):
        if kernel.name == "router_decode_kmajor_n32":
            late = replace(kernel.problem, num_tokens=IntRange(low=10, high=32))
            manifest = change(manifest, at, problem=late)
        if kernel.name == "router_decode_kmajor_n64":
            late = replace(kernel.problem, num_tokens=IntRange(low=33, high=64))
            manifest = change(manifest, at, problem=late)
    assert [most for most, _ in decode_ladder(manifest, PROBLEM, "sm_90a")] == [8]


def taking(*ranges) -> Manifest:
    """Decode kernels of these ranges of tokens, whatever a manifest's text would be allowed."""
    kernels = []
    for at, (low, high) in enumerate(ranges):
        kernel = decode_kernel()
        problem = replace(kernel.problem, num_tokens=IntRange(low=low, high=high))
        kernels.append(replace(kernel, name=f"decode_{at}", problem=problem))
    return Manifest(toolchain={}, kernels=tuple(kernels))


@pytest.mark.parametrize(
    ("ranges", "rungs"),
    [
        ([(1, None)], [MAX_TOKENS]),
        ([(1, 8), (9, None)], [8, MAX_TOKENS]),
        ([(1, None), (1, None)], [MAX_TOKENS]),
        ([(1, 8), (1, 2**40)], [8, MAX_TOKENS]),
        ([(1, MAX_TOKENS), (1, None), (MAX_TOKENS + 1, 2**62)], [MAX_TOKENS]),
        # Overlapping, the same twice, backward, and beyond a gap.
        ([(1, 8), (4, 16), (4, 16), (2, 12)], [8, 12, 16]),
        ([(1, 8), (16, 9), (12, 10)], [8]),
        ([(1, 8), (10, 64)], [8]),
    ],
)
def test_a_ladder_ends_whatever_the_ranges_are(ranges, rungs):
    with ends_within(5):
        ladder = decode_ladder(taking(*ranges), PROBLEM, "sm_90a")
    assert [most for most, _ in ladder] == rungs


def test_a_refusal_by_thousands_of_kernels_stays_a_message():
    with pytest.raises(NoKernelError, match=r"\.\.\. and 4936 more") as caught:
        select_kernel(taking(*[(1, 8)] * 5000), PROBLEM, "sm_100a")
    assert str(caught.value).count("built for sm_90a, this GPU is sm_100a") == 64
    assert len(str(caught.value)) < 8000
