"""Which step takes a call in a context that does not hold all clusters of a launch at once."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

import torch

from dsv4_router_runtime import Router
from dsv4_router_runtime.device import occupancy
from dsv4_router_runtime.device.occupancy import Room

K, TOP_K = 128, 6
N64 = "router_prefill_kmajor_n64.sm_90a"
N64_K8, N64_K4 = (f"router_prefill_kmajor_n64_{splits}.sm_90a" for splits in ("k8", "k4"))
DECODE = "router_decode_kmajor_n64.sm_90a"
HASH, TOPK = "router_hash.sm_90a", "router_topk.sm_90a"


@pytest.fixture
def launched(gpu, artifacts):
    """Bind a layer, call it, and return the kernel that was launched."""

    def call(num_tokens: int, num_experts: int = 384, **options) -> str:
        W = torch.zeros(num_experts, K, dtype=torch.bfloat16).t()
        bias = None if "tid2eid" in options else torch.zeros(num_experts)
        router = Router(
            W, bias, top_k=TOP_K, routed_scaling_factor=2.5, artifacts=artifacts, **options
        )
        x = torch.zeros(num_tokens, K, dtype=torch.bfloat16)
        out = torch.zeros(num_tokens, TOP_K), torch.zeros(num_tokens, TOP_K, dtype=torch.int32)
        ids = torch.zeros(num_tokens, dtype=torch.int32)
        router(x, *out, **({"input_ids": ids} if "tid2eid" in options else {}))
        return gpu.last["kernel"]

    return call


@pytest.mark.parametrize(
    ("exclusive", "shared", "clusters", "waves"),
    [
        *((7, 7, 6, 1), (7, 7, 7, 1), (7, 7, 8, 2)),
        *((7, 14, 8, 1), (3, 6, 6, 1), (3, 6, 7, 2)),
        *((1, 1, 6, 6), (0, 3, 6, 2), (0, 3, 7, 3)),
    ],
)
def test_clusters_run_in_waves(exclusive, shared, clusters, waves):
    assert Room(exclusive_clusters=exclusive, clusters=shared).waves(clusters) == waves


# Clusters of a decode launch: a tile of 64 experts each. Of prefill: 128 experts by 64 tokens.
@pytest.mark.parametrize(
    ("held", "kernel"),
    [
        ({DECODE: 6}, DECODE),
        ({DECODE: 5, N64: 3}, N64),
        ({DECODE: 5, N64: 2, N64_K8: 3}, N64_K8),
        ({DECODE: 1, N64: 1, N64_K8: 2, N64_K4: 3}, N64_K4),
        # The first of those with the fewest waves: 3, 2 and 2.
        ({DECODE: 2, N64: 2, N64_K8: 2, N64_K4: 1}, N64),
        # Not a product, while a fused kernel has room.
        ({DECODE: 1, N64: 1, N64_K8: 1, N64_K4: 1}, N64),
    ],
)
def test_a_call_takes_the_kernel_of_the_fewest_waves(gpu, launched, held, kernel):
    gpu.clusters = held
    assert launched(64) == kernel
    assert gpu.products == []


def test_a_tile_more_of_experts_than_an_h200_holds_is_no_second_wave(gpu, launched):
    """7 clusters of 16 CTAs; decode has a tile of 64 experts in each, prefill of 128."""
    gpu.clusters = {DECODE: 7, N64: 7}
    assert launched(64, num_experts=448) == DECODE
    assert launched(64, num_experts=449) == launched(33, num_experts=512) == N64


def test_a_table_is_read_by_its_kernel_in_any_number_of_waves(gpu, launched):
    """It reads the rows of a few experts. That more waves take longer was not measured."""
    gpu.clusters = {HASH: 1}
    table = torch.arange(TOP_K, dtype=torch.int32).repeat(9, 1)
    assert launched(40, tid2eid=table) == HASH


def test_a_product_takes_what_no_fused_kernel_has_room_for(gpu, launched):
    gpu.unfit = dict.fromkeys((DECODE, N64, N64_K8, N64_K4), "no room")
    gpu.clusters = {TOPK: 1}
    assert launched(64) == TOPK
    assert len(gpu.products) == 1


def test_what_is_passed_over_is_named_and_a_warning_only_without_room(gpu, launched, caplog):
    gpu.unfit, gpu.clusters = {DECODE: "no room for a cluster"}, {N64: 2, N64_K8: 3}
    with caplog.at_level(logging.INFO, "dsv4_router_runtime"):
        launched(64)
    assert [(each.kernel, each.reason, each.instead) for each in occupancy.fallbacks()] == [
        (DECODE, "no room for a cluster", N64_K8),
        (N64, "its launches take 2 waves of clusters in this context", N64_K8),
    ]
    said = {record.getMessage().split()[0]: record.levelno for record in caplog.records}
    assert (said[DECODE], said[N64]) == (logging.WARNING, logging.INFO)
