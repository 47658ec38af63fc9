"""The table of launch parameters: one description per name, and what every kernel has to take."""

from __future__ import annotations

import pytest
from conftest import sample_kernel

from build_kernels.kernels import shapes
from build_kernels.specs import KERNELS, KernelSpec
from dsv4_router_runtime.artifacts.kernel import PARAMETER_KINDS, POINTER_ELEMENT_BYTES
from dsv4_router_runtime.parameters import (
    ABI,
    BIASES,
    BOUND,
    BROUGHT,
    FIRST_TOKEN,
    IMAGE_IDS,
    LAUNCH,
    OUT_LOGITS,
    OUT_LOGITS_STRIDE,
    PARAMETERS_OFF,
    TENSORS,
    WORKSPACE,
    tensor_dtypes,
)

ALL = {item.name: item for abi in ABI.values() for item in abi}
WITH_WORKSPACE = [spec for spec in KERNELS if spec.role in ("decode", "prefill")]


@pytest.mark.parametrize("role", ABI)
def test_a_name_is_described_once(role: str) -> None:
    names = [item.name for item in ABI[role]]
    assert len(set(names)) == len(names)
    assert all(item is ALL[item.name] for item in ABI[role])


@pytest.mark.parametrize("role", ABI)
def test_tensor_maps_come_first(role: str) -> None:
    """A kernel takes them one by one, and all that follows as one NamedTuple."""
    are_maps = [item.kind == "tensor_map" for item in ABI[role]]
    assert are_maps == sorted(are_maps, reverse=True)


@pytest.mark.parametrize("role", ABI)
def test_every_kernel_takes_every_option(role: str) -> None:
    """An option that a kernel did not take would do nothing there.

    router_hash serves no image row, and has no logits of the whole gate. A kernel that reads logits
    reads them from out_logits.
    """
    options = {item.name for item in ALL.values() if item.off is not None}
    # No option: a launch's place in its call.
    options.discard(FIRST_TOKEN.name)
    assert (FIRST_TOKEN in ABI[role]) == (role == "prefill")
    if role not in ("decode", "prefill"):
        options -= {OUT_LOGITS.name, OUT_LOGITS_STRIDE.name}
    if role == "hash":
        options -= {item.name for item in (*BIASES, *IMAGE_IDS)}
    assert options <= {item.name for item in ABI[role]}


@pytest.mark.parametrize("name", ALL)
def test_words_are_those_of_the_manifest(name: str) -> None:
    item = ALL[name]
    assert item.kind in PARAMETER_KINDS
    assert item.given in (BOUND, BROUGHT, LAUNCH)
    assert (item.element_type in POINTER_ELEMENT_BYTES) == (item.kind == "pointer")
    assert bool(item.dtypes) == bool(item.shape) == (item.tensor is not None)


def test_a_pointer_is_off_when_it_is_null() -> None:
    pointers = [item for item in ALL.values() if item.kind == "pointer"]
    assert {item.off for item in pointers} == {None, 0}


def test_a_dependent_launch_reads_early_only_what_a_layer_binds_and_token_ids() -> None:
    """The list that Router's `pdl` promises: these must not be the work of the kernel before."""
    early = {item.tensor for item in ALL.values() if item.tensor and not item.after_wait}
    assert early == {
        *("W_gate", "e_bias", "bias_vl", "tid2eid", "to_physical", "logical_count", "input_ids"),
    }


def test_a_tensor_has_the_same_dtypes_in_every_kernel() -> None:
    for role in ABI:
        for tensor, dtypes in tensor_dtypes(role).items():
            assert all(tensor_dtypes(other).get(tensor, dtypes) == dtypes for other in ABI)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_either_dtype_has_a_flag_that_is_off_for_the_first(name: str) -> None:
    flag, dtypes = TENSORS[name].other_dtype, TENSORS[name].dtypes
    assert (flag is not None) == (len(dtypes) == 2)
    assert dtypes[1:] in ((), ("int64",), ("bfloat16",))
    assert flag is None or PARAMETERS_OFF[flag] == 0


@pytest.mark.parametrize("num_experts", range(1, shapes.MAX_EXPERTS + 1, 21))
@pytest.mark.parametrize("spec", WITH_WORKSPACE, ids=lambda spec: spec.name)
def test_a_workspace_is_laid_out_as_the_kernels_do(spec: KernelSpec, num_experts: int) -> None:
    """Tickets, then per token a pitch of whole tiles: see `candidates_of`.

    The tickets are those of the role, whatever the kernel's own tile. Of one tile of 64 nothing is
    merged; a prefill CTA merges its 128.
    """
    kernel = sample_kernel(spec.name)
    most = kernel.most_tokens(num_experts)
    tickets = {"decode": shapes.MAX_DECODE_TOKENS, "prefill": shapes.MAX_PREFILL_TOKENS}
    pitch = -(-num_experts // spec.expert_tile) * spec.expert_tile * shapes.CANDIDATE_BYTES
    for num_tokens in (1, 7, most):
        size = kernel.workspace_bytes(num_tokens, num_experts)
        if spec.role == "decode" and num_experts <= shapes.EXPERT_TILE:
            assert size == 0
        else:
            assert size == 4 * tickets[spec.role] + num_tokens * pitch
    [built] = [item.scratch for item in spec.parameters if item.name == WORKSPACE.name]
    assert size <= 4 * built.elements
