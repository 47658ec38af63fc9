"""Inputs of cases in which every factor and the last bit of a score count, and their judgement."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("numpy", reason="needs the extra `verify`")
pytest.importorskip("torch", reason="needs the extra `torch`")
pytest.importorskip("elftools", reason="needs dsv4-router-builder")

import numpy as np
import torch
from conftest import sample_manifest

from build_kernels.evidence.cases import VOCABULARY, Case
from build_kernels.evidence.goals import goals_met
from build_kernels.evidence.inputs import SCALE, Inputs, make_inputs
from build_kernels.evidence.outputs import against_reference, new_outputs
from dsv4_router_runtime.exact import KERNELS as EXACT
from dsv4_router_runtime.exact import exact_scores
from dsv4_router_runtime.reference import Arithmetic, select_with

KERNELS = {kernel.role: kernel for kernel in sample_manifest(("sm_90a",)).kernels}


def bf16(bits: Any) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).double()


@pytest.mark.parametrize("kind", ["dense", "near"])
@pytest.mark.parametrize("role", ["decode", "prefill", "hash"])
def test_the_products_are_the_logits_in_any_order_of_the_sums(role: str, kind: str) -> None:
    case = Case(num_tokens=8, num_experts=100, top_k=6, k=1024, kind=kind)
    inputs = make_inputs(KERNELS[role], case)
    terms = bf16(inputs.tensors["hidden_states"])[:, :, None] * bf16(inputs.tensors["W_gate"])
    if kind == "dense":
        assert (terms != 0).all()
    for order in (torch.arange(1024), torch.randperm(1024)):
        total = torch.zeros(8, 100)
        for at in order:
            total += terms[:, at].float()
        np.testing.assert_array_equal(total.numpy(), inputs.logits)


def ids_with(inputs: Inputs, changed: torch.Tensor) -> Any:
    """Return the ids if the scores of some experts are off by units in the last place."""

    def scores(logits: torch.Tensor) -> torch.Tensor:
        exact = exact_scores(logits)
        return (exact.view(torch.int32) + changed.int()).view(torch.float32)

    arithmetic = Arithmetic(scores=scores, weights=EXACT.weights)
    logits = torch.from_numpy(inputs.logits).float()
    bias = torch.from_numpy(inputs.tensors["e_bias"])
    return select_with(arithmetic, logits, bias, SCALE, inputs.case.top_k, {})[1].numpy()


@pytest.mark.parametrize("experts", [128, 256, 384, 512])
def test_a_slot_whose_scores_are_off_by_two_units_changes_ids(experts: int) -> None:
    case = Case(num_tokens=8, num_experts=experts, top_k=8, kind="near")
    inputs = make_inputs(KERNELS["select"], case)
    np.testing.assert_array_equal(ids_with(inputs, torch.zeros(experts)), inputs.ids)
    for slot in range(experts // 32):
        of_slot = 2 * (torch.arange(experts) // 32 == slot).int()
        for change in (of_slot, -of_slot):
            assert (ids_with(inputs, change) != inputs.ids).any(), f"slot {slot}"


@pytest.mark.parametrize(("kind", "is_exact"), [("dense", True), ("integers", False)])
def test_a_weight_that_is_one_unit_off_is_wrong_if_the_oracle_is_exact(
    kind: str, is_exact: bool
) -> None:
    case = Case(num_tokens=3, num_experts=40, top_k=4, kind=kind)
    inputs = make_inputs(KERNELS["select"], case)
    outputs = new_outputs(case)
    outputs["out_weights"][:, :4] = inputs.weights
    outputs["out_ids"][:, :4] = inputs.ids
    assert against_reference(inputs, outputs)[0] == []
    outputs["out_weights"].view(np.int32)[1, 2] += 1
    problems, _ = against_reference(inputs, outputs)
    assert any("a weight is off" in problem for problem in problems) == is_exact


def met(*options: str, role: str = "select", **sizes: Any) -> set[str]:
    given = {"num_tokens": 8, "num_experts": 128, "top_k": 8, **sizes}
    return goals_met(KERNELS[role], make_inputs(KERNELS[role], Case(**given, options=options)))


def test_an_unknown_token_id_counts_only_if_the_row_is_padded_for_nothing_else() -> None:
    goal = "a token id one beyond the table"
    assert goal in met("table", "unknown")
    assert goal in met("table", "unknown", "forced")
    for others in (("all_forced",), ("empty",)):
        assert goal not in met("table", "unknown", *others), others
    # The token ids of rows 0, 1, 2 are unknown: VOCABULARY, -1, VOCABULARY.
    assert (
        VOCABULARY
        in make_inputs(
            KERNELS["select"],
            Case(num_tokens=3, num_experts=40, top_k=4, options=("table", "unknown", "images")),
        ).tensors["input_ids"]
    )
    assert goal not in met("table", "unknown", "images", num_tokens=3)


def test_a_row_option_is_alone_only_without_the_others() -> None:
    goal = "no option for rows but padding"
    assert goal in met("padding", "shared", "temperature")
    assert goal not in met("padding", "count")
    assert goal not in met("padding", "empty")


def test_forced_rows_name_each_place_that_comes_twice() -> None:
    places = {goal for goal in met("all_forced", num_tokens=33) if goal.startswith("a forced")}
    assert len(places) == 7
    few = {goal for goal in met("all_forced", num_tokens=5) if goal.startswith("a forced")}
    assert len(few) <= 1, "row 3 is padded last of all"


def test_near_logits_need_all_of_their_places() -> None:
    assert "nearly equal logits among 128 experts" in met(kind="near")
    assert "nearly equal quotients among 128 experts" in met("temperature", kind="near")
    assert "nearly equal logits among 128 experts" not in met(kind="near", top_k=2)
    assert "nearly equal logits among 128 experts" not in met("table", kind="near")


@pytest.mark.parametrize("role", ["select", "decode"])
def test_every_second_row_of_nans_has_three_numbers(role: str) -> None:
    k = 0 if role == "select" else 1024
    case = Case(num_tokens=4, num_experts=100, top_k=8, k=k, kind="nans")
    is_number = ~np.isnan(make_inputs(KERNELS[role], case).logits)
    assert (is_number[0::2].sum(1) > 8).all()
    assert (is_number[1::2].sum(1) <= 3).all()
