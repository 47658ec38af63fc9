"""The table of kernels: what it promises to cover, and that reading it compiles nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sample_manifest

from build_kernels import specs
from build_kernels.kernels import shapes
from build_kernels.specs import ARCHITECTURES, FAMILIES, KERNELS, CudaSource, DslSource
from dsv4_router_runtime.artifacts.kernel import (
    GRID_TERMS,
    KIND_LAYOUT,
    LAYOUTS,
    IntRange,
    TensorMapRecipe,
)

PACKAGE = Path(specs.__file__).parent
IDS = [spec.name for spec in KERNELS]


def test_names_and_symbols_are_unique() -> None:
    assert len({spec.name for spec in KERNELS}) == len(KERNELS)
    assert len({spec.symbol for spec in KERNELS}) == len(KERNELS)


@pytest.mark.parametrize("spec", KERNELS, ids=IDS)
def test_every_kernel_is_built_for_every_architecture(spec: specs.KernelSpec) -> None:
    assert spec.archs == tuple(arch.name for arch in ARCHITECTURES)


def test_a_new_architecture_of_a_generation_is_one_line() -> None:
    lines = Path(specs.__file__).read_text().splitlines()
    for arch in ARCHITECTURES:
        assert sum(arch.name in line for line in lines) == 1


def test_a_family_is_built_if_it_is_asked_for() -> None:
    families = {family.name for family in FAMILIES}
    assert families == {"sm_100f", "sm_103f"}
    for spec in KERNELS:
        assert families.isdisjoint(spec.archs)
        assert families < set(spec.targets) == set(specs.TARGETS)


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
def test_decode_covers_1_to_64_tokens_in_both_layouts(layout: str) -> None:
    decode = [spec for spec in KERNELS if spec.role == "decode" and spec.problem.layout == layout]
    ranges = [spec.problem.num_tokens for spec in decode]
    assert all(any(n in tokens for tokens in ranges) for n in range(1, 65))
    assert not any(65 in tokens for tokens in ranges)


@pytest.mark.parametrize("layout", ["kmajor", "emajor"])
def test_prefill_takes_the_tokens_of_an_h200s_clusters_in_both_layouts(layout: str) -> None:
    """As many clusters of 16, 8 or 4 CTAs as an H200 holds at once."""
    prefill = [spec for spec in KERNELS if spec.role == "prefill" and spec.problem.layout == layout]
    assert [(spec.token_tile, spec.k_splits) for spec in prefill] == [
        *((64, 16), (64, 8), (64, 4), (128, 4))
    ]
    for spec in prefill:
        assert spec.expert_tile == 128
        assert spec.cluster == (spec.k_splits, 1, 1)
        assert spec.max_clusters == {16: 7, 8: 15, 4: 30}[spec.k_splits]
        most = min(spec.max_clusters * spec.token_tile, shapes.MAX_PREFILL_TOKENS)
        assert spec.problem.num_tokens == IntRange(low=1, high=most)
        assert bool(spec.problem.same_bits_only) == (spec.name.endswith("n128_k4"))


def test_the_hash_kernel_covers_the_tokens_of_seven_clusters() -> None:
    """As many clusters of 16 CTAs as an H200 holds at once; beyond, the whole gate takes over."""
    (spec,) = (spec for spec in KERNELS if spec.role == "hash")
    assert all(n in spec.problem.num_tokens for n in range(1, 7 * spec.token_tile + 1))
    assert 7 * spec.token_tile + 1 not in spec.problem.num_tokens


def test_topk_covers_every_number_of_tokens() -> None:
    (spec,) = (spec for spec in KERNELS if spec.role == "select")
    assert all(n in spec.problem.num_tokens for n in (1, 64, 65, 1 << 20))


@pytest.mark.parametrize("spec", KERNELS, ids=IDS)
def test_shapes_of_the_contract_are_in_range(spec: specs.KernelSpec) -> None:
    assert all(e in spec.problem.num_experts for e in (1, 8, 132, 144, 160, 216, 256, 384, 512))
    assert all(k in spec.problem.top_k for k in range(1, 9))
    assert 9 not in spec.problem.top_k
    assert all(k % spec.problem.k_multiple == 0 for k in (4096, 5120, 6144, 7168))


@pytest.mark.parametrize("spec", KERNELS, ids=IDS)
def test_words_are_those_of_the_schema(spec: specs.KernelSpec) -> None:
    assert spec.problem.layout in LAYOUTS or spec.role == "select"
    assert {axis for axis in spec.grid if isinstance(axis, str)} <= set(GRID_TERMS)
    assert {parameter.kind for parameter in spec.parameters} <= set(KIND_LAYOUT)
    names = [parameter.name for parameter in spec.parameters]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("spec", [spec for spec in KERNELS if isinstance(spec.source, DslSource)])
def test_tensor_maps_cover_one_tile(spec: specs.KernelSpec) -> None:
    maps = {item.name: item.tensor_map for item in spec.parameters if item.tensor_map}
    assert isinstance(spec.source, DslSource)
    assert spec.source.token_tile == spec.token_tile
    x_box = {"K_in_block": 64, "N": spec.token_tile, "K_block": spec.source.chunk}
    assert boxes(maps["x_map"]) == x_box
    assert spec.problem.layout == spec.source.layout
    if spec.role in ("decode", "prefill"):
        w_map = maps["w_map"]
        # By its swizzle a box is 128 bytes wide: 64 experts if they are contiguous.
        width = spec.expert_tile if spec.problem.layout == "kmajor" else 64
        assert boxes(w_map) == {"K": 64, "E": width}
        assert spec.expert_tile == 64 * spec.source.m_tiles
        assert w_map.dims[0] == {"kmajor": "K", "emajor": "E"}[spec.problem.layout]
    for recipe in maps.values():
        # The swizzle spans the box's rows exactly.
        assert (recipe.box[0] * 2, recipe.swizzle) == (128, "128B")


def boxes(recipe: TensorMapRecipe) -> dict[str, int]:
    return dict(zip(recipe.dims, recipe.box, strict=True))


def test_topk_source_uses_every_constant_that_it_is_given() -> None:
    """And states none of them itself: what is said twice drifts."""
    (spec,) = (spec for spec in KERNELS if isinstance(spec.source, CudaSource))
    assert isinstance(spec.source, CudaSource)
    code = re.sub(r"//[^\n]*", "", (PACKAGE / spec.source.file).read_text())
    for name, value in spec.source.defines.items():
        assert re.search(rf"\b{name}\b", code), name
        if value > 8:
            assert not re.search(rf"\b{value}\b", code), (name, value)
    assert spec.token_tile == spec.source.defines["WARPS"]
    assert spec.source.block == (32 * spec.token_tile, 1, 1)


@pytest.mark.parametrize("module", ["build_kernels.specs", "build_kernels.cli.main"])
def test_importing_loads_no_compiler_and_no_driver(module: str) -> None:
    """Nor does a command, and the one that is called is the only one imported."""
    if module.endswith("main"):
        pytest.importorskip("click", reason="needs dsv4-router-builder")
    heavy = {"cutlass", "torch", "numpy", "cuda", "sentryward"}
    code = f"import sys, {module} as module\n"
    if module.endswith("main"):
        code += "assert not {'build_kernels.bench', 'build_kernels.evidence'} & set(sys.modules)\n"
        code += "for name in module.COMMANDS: module.main.get_command(None, name)\n"
    code += f"print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_samples_of_the_runtimes_tests_are_shaped_like_the_kernels():
    """All but scratch, and the depth of a read: those differ from tile to tile."""

    def shape(kernel, launch):
        parameters = [
            (p.name, p.kind, p.element_type, p.tensor_map and p.tensor_map.dims)
            for p in kernel.parameters
            if p.scratch is None
        ]
        tiles = ("k_splits", "expert_tile", "token_tile")
        named = ("cluster", "grid", *tiles, "pdl", "max_clusters")
        return parameters, kernel.problem, [getattr(launch, name) for name in named]

    samples = {kernel.name: kernel for kernel in sample_manifest(archs=("sm_90a",)).kernels}
    assert set(samples) == {spec.name for spec in KERNELS}
    for spec in KERNELS:
        sample = samples[spec.name]
        assert shape(sample, sample.launch) == shape(spec, spec), spec.name
