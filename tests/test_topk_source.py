"""topk.cu as compiled: what its PTX may and may not contain, on every architecture."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs dsv4-router-builder")

from builds import topk_set

from build_kernels.binaries import cubin
from build_kernels.building import compilers
from build_kernels.evidence.artifact import Artifact, load_artifact
from build_kernels.specs import ARCHITECTURES, KERNELS, CudaSource

ARCHS = [arch.name for arch in ARCHITECTURES]
(SPEC,) = (spec for spec in KERNELS if isinstance(spec.source, CudaSource))

NAMES = [parameter.name for parameter in SPEC.parameters]
POINTERS = {p.name for p in SPEC.parameters if p.kind == "pointer"}
# What makes a row padding or a forced one, whose warp selects nothing, or an image row, which no
# table serves. Forced ids that name no experts make it padding.
ROW_FLAGS = {
    *("padding_mask", "num_valid_tokens", "input_ids", "image_mask"),
    *("forced_mask", "forced_ids"),
}
# What decides how many experts the estimates leave, and their ranks.
CANDIDATES = {"logits", "e_bias", "bias_vl", "shared"}

REGISTER = re.compile(r"%(?:p|r|rd|rs|f|fd)\d+")
GUARD = re.compile(r"@!?(%p\d+)\s+")


@pytest.fixture(scope="module", params=ARCHS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = topk_set(tmp_path_factory.mktemp("topk") / "artifacts", [request.param])
    return load_artifact(folder, f"{SPEC.name}.{request.param}")


def instructions(ptx: str) -> list[str]:
    """The entry's statements, comments and labels left out."""
    body = re.sub(r"//[^\n]*", "", ptx.split(".entry", 1)[1]).split("{", 1)[1]
    statements = (line.strip() for line in re.split(r"[;\n]", body))
    return [line for line in statements if line and not line.startswith((".", "$", "}", "{"))]


def data_behind_branches(ptx: str) -> set[str]:
    """What decides branches: "*name" for data behind a pointer argument, "*shared" for shared
    memory, "name" for an argument itself. By the sources of every register, to a fixed point.
    """
    sources: dict[str, set[str]] = {}
    lines = instructions(ptx)
    before = -1
    while before != (before := sum(map(len, sources.values()))):
        for line in lines:
            operation = GUARD.sub("", line)
            registers = REGISTER.findall(operation)
            if not registers or operation.startswith(("st.", "bra", "red.")):
                continue
            # Writers of two predicates (setp p|q) have both in front of the first comma.
            written = REGISTER.findall(operation.split(",", 1)[0])
            read = [*registers[len(written) :], *GUARD.findall(line)]
            found = set().union(*(sources.get(register, set()) for register in read))
            if operation.startswith("ld.param"):
                found.update(re.findall(r"_param_(\d+)", operation))
            if operation.startswith("ld.global"):
                found |= {f"*{name}" for name in found if not name.startswith("*")}
            if operation.startswith("ld.shared"):
                found.add("*shared")
            for register in written:
                sources.setdefault(register, set()).update(found)
    assert any(name.startswith("*") for found in sources.values() for name in found), "no loads"
    guards = (GUARD.match(line) for line in lines if re.search(r"\bbra\b", line))
    return set().union(*(sources.get(guard[1], set()) for guard in guards if guard))


def named(sources: set[str]) -> set[str]:
    """Without the arguments that are numbers, whose index only takes part in an address."""
    names = {re.sub(r"\d+", lambda index: NAMES[int(index[0])], source) for source in sources}
    return {name for name in names if name[:1] != "*" or name[1:] in POINTERS | {"shared"}}


def test_the_score_has_the_constants_of_the_decode_kernels() -> None:
    """One token's weight has the same bits in decode and prefill only if they agree to the last."""
    folder = Path(compilers.__file__).parents[1] / "kernels"
    source = (folder / "topk.cu").read_text()
    body = source[source.index("float router_score(float x)") : source.index("largest_finite;")]
    literal = r"(-?(?:0x[\d.a-f]+p[-+]?\d+|\d+\.\d+(?:e-?\d+)?))f\b"
    in_topk = re.findall(literal, re.sub(r"//[^\n]*", "", body))
    assigned = {
        node.targets[0].id: eval(compile(ast.Expression(node.value), "score.py", "eval"))
        for node in ast.parse((folder / "score.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    quarter, rest = assigned["LOG2E_QUARTER"], assigned["LOG2E_QUARTER_REST"]
    in_decode = [
        *(340.0, assigned["ROUND"], -quarter, -quarter, -rest),
        *(*assigned["EXP2_TERMS"], *assigned["LOG1P_TERMS"]),
    ]
    found = [float.fromhex(text) if "0x" in text else float(text) for text in in_topk]
    assert found == in_decode


def test_control_flow_depends_on_arguments_and_row_flags(compiled: Artifact) -> None:
    deciding = named(data_behind_branches(compiled.ptx))
    assert {name[1:] for name in deciding if name.startswith("*")} == ROW_FLAGS | CANDIDATES
    # The scale and the outputs decide nothing.
    assert not deciding & {"out_ids_stride", "out_weights_stride", "routed_scaling_factor"}


def test_the_analysis_sees_a_branch_on_data() -> None:
    text = (
        'extern "C" __global__ void k(float* p) {\n'
        "  float x = p[threadIdx.x];\n"
        "  while (x > 1.0f) { x = x * 0.5f; p[threadIdx.x + 32] = x; }\n"
        "}"
    )
    _, ptx = compilers.nvrtc_compile(text, name="branch.cu", arch="sm_90a")
    assert "*0" in data_behind_branches(ptx)


def test_it_waits_for_the_kernel_before_it_reads_or_writes(compiled: Artifact) -> None:
    lines = instructions(compiled.ptx)
    wait = lines.index("griddepcontrol.wait")
    first = next(i for i, line in enumerate(lines) if re.search(r"\b(ld|st)\.global", line))
    assert wait < lines.index("griddepcontrol.launch_dependents") < first


def test_its_arithmetic_is_ieee_but_for_a_corrected_seed_and_estimates(compiled: Artifact) -> None:
    lines = instructions(compiled.ptx)
    approximate = {line.split()[0] for line in lines if re.match(r"\S+\.(approx|full)\b", line)}
    estimating = {f"{name}.approx.ftz.f32" for name in ("ex2", "lg2", "sqrt")}
    assert approximate == {"rsqrt.approx.ftz.f32"} | estimating
    names = {line.split()[0] for line in lines}
    assert "div.rn.f32" in names
    # A rounding mode in PTX forbids ptxas to fuse a product with a sum.
    sums_and_products = {
        name for name in names if re.match(r"(add|sub|mul)\.(?!s|u|b|wide|lo|hi)", name)
    }
    assert sums_and_products <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32"}
    assert not any(".f64" in name for name in names)


def test_it_fits_eight_blocks_on_a_multiprocessor(compiled: Artifact) -> None:
    facts = cubin.read_cubin(compiled.cubin)
    assert facts.registers * 128 * 8 <= 65536
    assert 8 * (facts.static_shared_bytes + 1024) <= 100 * 1024
    assert facts.stack_bytes == 0


def test_nothing_of_it_lies_in_global_memory(compiled: Artifact) -> None:
    """A constant that NVRTC could not fold would cost a load and a relocation."""
    assert not re.search(r"^\s*\.(visible |weak |extern )*\.?(global|const)\b", compiled.ptx, re.M)
