"""The table of launch parameters: one description per name, and what every kernel has to take."""

from __future__ import annotations

import pytest

from build_kernels.kernels import shapes
from dsv4_router_runtime.artifacts.kernel import PARAMETER_KINDS, POINTER_ELEMENT_BYTES
from dsv4_router_runtime.parameters import (
    ABI,
    BIASES,
    BOUND,
    BROUGHT,
    IMAGE_IDS,
    LAUNCH,
    OUT_LOGITS,
    OUT_LOGITS_STRIDE,
    PARAMETERS_OFF,
    TENSORS,
    tensor_dtypes,
    workspace_bytes,
)

ALL = {item.name: item for abi in ABI.values() for item in abi}


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
    if role != "decode":
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


@pytest.mark.parametrize("num_tokens", [1, 7, shapes.MAX_DECODE_TOKENS])
@pytest.mark.parametrize("num_tiles", range(1, shapes.MAX_EXPERTS // shapes.EXPERT_TILE + 1))
def test_a_workspace_is_laid_out_as_the_kernels_do(num_tokens: int, num_tiles: int) -> None:
    """Tickets, then per token a pitch of whole tiles: see `candidates_of`. One tile merges none."""
    low, high = (num_tiles - 1) * shapes.EXPERT_TILE + 1, num_tiles * shapes.EXPERT_TILE
    candidates = num_tokens * num_tiles * shapes.EXPERT_TILE * shapes.CANDIDATE_BYTES
    size = 0 if num_tiles == 1 else shapes.TICKET_BYTES + candidates
    assert workspace_bytes(num_tokens, low) == workspace_bytes(num_tokens, high) == size
    assert size <= shapes.WORKSPACE_BYTES
