"""topk.cu as compiled: what its PTX may and may not contain, on every architecture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the extra `build`")

from build_kernels import compilers, cubin
from build_kernels.specs import ARCHITECTURES, KERNELS, CudaSource

ARCHS = [arch.name for arch in ARCHITECTURES]
(SPEC,) = (spec for spec in KERNELS if isinstance(spec.source, CudaSource))

# Where data comes from: memory, and the warp's other lanes.
LOADS = ("ld.global", "ld.shared", "redux", "vote", "shfl", "match")
REGISTER = re.compile(r"%(?:p|r|rd|f|rs|fd)\d+")


@pytest.fixture(scope="module", params=ARCHS)
def compiled(request: pytest.FixtureRequest) -> compilers.Compiled:
    return compilers.compile_kernel(SPEC, request.param, Path("unused"))


def instructions(ptx: str) -> list[str]:
    """The entry's statements, comments and labels left out."""
    body = re.sub(r"//[^\n]*", "", ptx.split(".entry", 1)[1]).split("{", 1)[1]
    statements = (line.strip() for line in re.split(r"[;\n]", body))
    return [line for line in statements if line and not line.startswith((".", "$", "}", "{"))]


def data_dependent_branches(ptx: str) -> list[str]:
    """Branches whose predicate derives from loaded data: registers tainted to a fixed point."""
    tainted: set[str] = set()
    lines = instructions(ptx)
    before = -1
    while before != len(tainted):
        before = len(tainted)
        for line in lines:
            operation = re.sub(r"^@!?%p\d+\s+", "", line)
            registers = REGISTER.findall(operation)
            if not registers or operation.startswith(("st.", "bra", "red.")):
                continue
            # Writers of two predicates (setp p|q) have both in front of the first comma.
            written = REGISTER.findall(operation.split(",", 1)[0])
            if operation.startswith(LOADS) or tainted & set(registers[len(written) :]):
                tainted.update(written)
    assert tainted, "the analysis found no loads"
    guards = ((line, re.match(r"@!?(%p\d+)\s+bra", line)) for line in lines)
    return [line for line, guard in guards if guard and guard.group(1) in tainted]


def test_control_flow_does_not_depend_on_data(compiled: compilers.Compiled) -> None:
    assert data_dependent_branches(compiled.ptx) == []


def test_the_analysis_sees_a_branch_on_data() -> None:
    text = (
        'extern "C" __global__ void k(float* p) {\n'
        "  float x = p[threadIdx.x];\n"
        "  while (x > 1.0f) { x = x * 0.5f; p[threadIdx.x + 32] = x; }\n"
        "}"
    )
    _, ptx = compilers.nvrtc_compile(text, name="branch.cu", arch="sm_90a")
    assert data_dependent_branches(ptx)


def test_it_waits_for_the_kernel_before_it_reads_or_writes(compiled: compilers.Compiled) -> None:
    lines = instructions(compiled.ptx)
    wait = lines.index("griddepcontrol.wait")
    first = next(i for i, line in enumerate(lines) if re.search(r"\b(ld|st)\.global", line))
    assert wait < lines.index("griddepcontrol.launch_dependents") < first


def test_its_arithmetic_is_ieee_but_for_one_corrected_seed(compiled: compilers.Compiled) -> None:
    lines = instructions(compiled.ptx)
    approximate = {line.split()[0] for line in lines if re.match(r"\S+\.(approx|full)\b", line)}
    assert approximate == {"rsqrt.approx.ftz.f32"}
    names = {line.split()[0] for line in lines}
    assert "div.rn.f32" in names
    # A rounding mode in PTX forbids ptxas to fuse a product with a sum.
    sums_and_products = {
        name for name in names if re.match(r"(add|sub|mul)\.(?!s|u|b|wide|lo|hi)", name)
    }
    assert sums_and_products <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32"}
    assert not any(".f64" in name for name in names)


def test_it_fits_eight_blocks_on_a_multiprocessor(compiled: compilers.Compiled) -> None:
    facts = cubin.read_cubin(compiled.cubin)
    assert facts.registers * 128 * 8 <= 65536
    assert 8 * (facts.static_shared_bytes + 1024) <= 100 * 1024
    assert facts.stack_bytes == 0


def test_nothing_of_it_lies_in_global_memory(compiled: compilers.Compiled) -> None:
    """A constant that NVRTC could not fold would cost a load and a relocation."""
    assert not re.search(r"^\s*\.(visible |weak |extern )*\.?(global|const)\b", compiled.ptx, re.M)
