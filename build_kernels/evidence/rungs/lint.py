"""Rung `lint`: compile with the DSL's diagnostics on; each one must be explained.

A process of its own compiles the kernel again from the present sources. The PTX must be the
artifact's, or the diagnostics would be about another kernel. (The cubin differs on sm_100: its tool
note records the assembler's options.) These passes caught none of six mutants: a lint, no proof.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from build_kernels.building.entry import sha256
from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.result import FAILED, PASSED, Result, not_run
from build_kernels.specs import KERNELS, DslSource, KernelSpec
from dsv4_router_runtime.artifacts.json_reader import JsonNode

from .rung import Checker, Reads, Rung

OPTIONS_VARIABLE = "CUTE_DSL_COMPILER_OPT"
OPTIONS = "warnings remarks"
TIMEOUT_SECONDS = 300
_WORKER = f"import sys; from {__name__} import compile_here; compile_here(*sys.argv[1:])"

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_HEAD = re.compile(r"^(warning|remark|error)\[(\w+)\]:\s*(.*)$")
_FUNCTION = re.compile(r"^\s*in function `([^(`]+)")


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """One diagnostic: its code (W0015), its first line, and the kernel function it points into."""

    code: str
    message: str
    function: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The reason to accept one code of diagnostic in one function, and nowhere else."""

    code: str
    function: str
    reason: str


EXPLANATIONS = (
    Explanation(
        code="W0015",
        function="free_accumulator",
        reason=(
            "the epilogue warps read with tcgen05.ld, wait with tcgen05.wait::ld and then meet at "
            "named barrier 1 before warp 0 deallocates; the pass does not follow a named barrier "
            "inside a branch on the warp. Backing: the protocol and emulated rungs check that "
            "order, and both reject a decode kernel without that barrier, of a prefill kernel the "
            "emulated rung alone: the mutants 'dealloc before all warps have read' and 'prefill, "
            "sm_100: dealloc before both M tiles have read' of build_kernels.mutants"
        ),
    ),
)


def climb(artifact: Artifact, *, quick: bool) -> Result:
    """Compile and look for an unexplained diagnostic; quick and full are the same."""
    spec = next((item for item in KERNELS if item.name == artifact.kernel.name), None)
    if spec is None:
        return Result(status=FAILED, reason=f"no source makes a kernel {artifact.kernel.name}")
    if not isinstance(spec.source, DslSource):
        return not_run("CUDA C++: the DSL's diagnostics are about DSL kernels", applies=False)
    try:
        output, ptx_sha256 = _compile(spec, artifact.kernel.arch)
    except subprocess.TimeoutExpired:
        return not_run(f"the compiler took more than {TIMEOUT_SECONDS} s")
    except ModuleNotFoundError as error:
        return not_run(f"{error}; run `pip install dsv4-router-builder`")
    except LintError as error:
        return Result(status=FAILED, reason=str(error))
    if ptx_sha256 != artifact.kernel.ptx_sha256:
        return Result(
            status=FAILED,
            reason="the sources at hand do not compile to the artifact's PTX, so their "
            "diagnostics are about another kernel; run `build-kernels build`",
        )
    return judge(parse_diagnostics(output))


def judge(diagnostics: tuple[Diagnostic, ...]) -> Result:
    """Pass if each diagnostic has an explanation; the explanations become the assumptions."""
    reasons = {(item.code, item.function): item.reason for item in EXPLANATIONS}
    unexplained = [item for item in diagnostics if (item.code, item.function) not in reasons]
    figures = {"diagnostics": len(diagnostics), "explained": len(diagnostics) - len(unexplained)}
    if unexplained:
        lines = (f"{item.code} in {item.function}: {item.message}" for item in unexplained)
        return Result(status=FAILED, reason="; ".join(lines), figures=figures)
    explained = sorted({(item.code, item.function) for item in diagnostics})
    return Result(
        status=PASSED,
        figures=figures,
        assumptions=tuple(f"{key[0]} in {key[1]}: {reasons[key]}" for key in explained),
    )


def parse_diagnostics(output: str) -> tuple[Diagnostic, ...]:
    """Read the diagnostics in the compiler's output; one without a place is in function ""."""
    found: list[Diagnostic] = []
    for line in _COLOUR.sub("", output).splitlines():
        if head := _HEAD.match(line):
            found.append(Diagnostic(code=head[2], message=head[3].strip(), function=""))
        elif found and not found[-1].function and (place := _FUNCTION.match(line)):
            last = found[-1]
            found[-1] = Diagnostic(code=last.code, message=last.message, function=place[1])
    return tuple(found)


class LintError(Exception):
    """The kernel did not compile with diagnostics on."""


def _compile(spec: KernelSpec, arch: str) -> tuple[str, str]:
    """Return the compiler's output with diagnostics on, and the sha256 of the PTX."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("CUTE_DSL_")
    }
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (root, environment.get("PYTHONPATH", "")))
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        process = subprocess.run(
            [sys.executable, "-c", _WORKER, spec.name, arch, folder, str(report)],
            env=environment | {OPTIONS_VARIABLE: OPTIONS},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        output = process.stdout + process.stderr
        if process.returncode or not report.exists():
            raise LintError(f"does not compile with diagnostics on: {output.strip()[-500:]}")
        written = json.loads(report.read_text())
    if "missing" in written:
        raise ModuleNotFoundError(written["missing"])
    return output, written["ptx_sha256"]


def compile_here(name: str, arch: str, folder: str, report: str) -> None:
    """Compile one kernel in this process; the diagnostics go to its standard streams."""
    from build_kernels.building import compilers

    spec = next(item for item in KERNELS if item.name == name)
    try:
        compiled = compilers.compile_kernel(spec, arch, Path(folder))
        written = {"ptx_sha256": sha256(compiled.ptx.encode())}
    except ModuleNotFoundError as error:
        written = {"missing": str(error)}
    Path(report).write_text(json.dumps(written))


RUNG = Rung(
    name="lint",
    climbs=(climb,),
    checker=Checker(number=1, tool="nvidia-cutlass-dsl"),
    reads=Reads.SOURCES,
    cost=2,
    figures={"diagnostics": JsonNode.integer, "explained": JsonNode.integer},
    describe=lambda shown: [f"{shown['explained']} of {shown['diagnostics']} explained"],
)
