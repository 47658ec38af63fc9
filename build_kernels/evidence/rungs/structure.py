"""Rung `structure`: compare the cubin with its manifest entry and with its PTX.

Shows hashes, architecture, symbol, parameter block, registers, shared memory and the absence of
local memory. Shows that tensor, TMA, barrier and TMEM instructions occur as often as they must.
Does not show that ptxas translated them correctly.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from build_kernels.binaries import cubin, nvdisasm
from build_kernels.binaries.ptx.parser import parse
from build_kernels.binaries.ptx.syntax import Kernel, UnsupportedPtx
from build_kernels.binaries.wheels import ToolError
from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.result import FAILED, PASSED, QUICK, Result, not_run
from dsv4_router_runtime.artifacts.json_reader import JsonNode
from dsv4_router_runtime.artifacts.manifest import compute_capability

from .rung import Checker, Reads, Rung

NO_PTX = (
    "the set carries no PTX: the cubin was compared with the manifest, not the PTX's instructions "
    "with the cubin's"
)
_ELF_FLAGS_OFFSET = 48


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """A PTX instruction and the SASS opcode that it becomes.

    sass: a regular expression for the whole opcode. exact: the counts in SASS and PTX are equal.
    Otherwise one in PTX needs at least one in SASS: ptxas expands or repeats some instructions, and
    uses some opcodes for others too.
    """

    ptx: str
    sass: str
    exact: bool = True


# As ptxas of toolkit 12.9 writes them, read off the project's own kernels.
PAIRINGS = (
    Pairing(ptx="tcgen05.mma", sass=r"UTCHMMA(\..*)?"),
    # Not HGMMA.64x8x16.F16: ptxas closes a group that a branch may leave empty with one that is
    # predicated off and has no registers.
    Pairing(ptx="wgmma.mma_async", sass=r"HGMMA\..*F32.*"),
    Pairing(ptx="cp.async.bulk.tensor", sass=r"UTMALDG(\..*)?"),
    Pairing(ptx="prefetch.tensormap", sass=r"UTMACCTL\.PF"),
    Pairing(ptx="tcgen05.commit", sass=r"UTCBAR(\..*)?"),
    Pairing(ptx="tcgen05.ld", sass=r"LDTM(\..*)?"),
    Pairing(ptx="tcgen05.alloc", sass=r"UTCATOMSWS\.FIND_AND_SET(\..*)?", exact=False),
    Pairing(ptx="tcgen05.dealloc", sass=r"UTCATOMSWS\.AND"),
    Pairing(ptx="mbarrier.init", sass=r"SYNCS\.EXCH(\..*)?"),
    Pairing(ptx="mbarrier.arrive", sass=r"SYNCS\.ARRIVE(\..*)?"),
    # Each wait is one test out of line and one or more TRYWAITs in loops that ptxas may unroll.
    Pairing(ptx="mbarrier.try_wait", sass=r"SYNCS\.PHASECHK\.TRANS64"),
    Pairing(ptx="mbarrier.try_wait", sass=r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT", exact=False),
    Pairing(ptx="barrier.cluster.arrive", sass=r"UCGABAR_ARV"),
    Pairing(ptx="barrier.cluster.wait", sass=r"UCGABAR_WAIT"),
    Pairing(ptx="st.async", sass=r"STAS(\..*)?"),
    Pairing(ptx="atom", sass=r"ATOMG(\..*)?"),
    Pairing(ptx="redux.sync", sass=r"C?REDUX(\..*)?", exact=False),
    Pairing(ptx="griddepcontrol.wait", sass=r"ACQBULK"),
    Pairing(ptx="griddepcontrol.launch_dependents", sass=r"PREEXIT"),
)


def climb(artifact: Artifact, *, quick: bool) -> Result:
    """Compare manifest, cubin, PTX and SASS; quick and full are the same.

    A set without PTX is compared with its manifest alone. That pass covers less, so it is quick.
    """
    try:
        read = cubin.read_cubin(artifact.cubin)
        sass = nvdisasm.sass_opcodes(artifact.cubin_path)
        problems = [*_against_manifest(artifact, read, sass)]
        paired: dict[str, int] = {}
        if artifact.has_ptx:
            ptx = parse(artifact.ptx)
            paired = {pairing.ptx: _count(ptx, pairing.ptx) for pairing in PAIRINGS}
            problems += [
                *_between_manifest_and_ptx(artifact, ptx),
                *_pairing_problems(paired, sass),
            ]
    except ToolError as error:
        return not_run(str(error))
    except (cubin.CubinError, UnsupportedPtx) as error:
        return Result(status=FAILED, reason=str(error))
    if problems:
        return Result(status=FAILED, reason="; ".join(problems))
    result = Result(status=PASSED, figures=_figures(artifact, read, sass, paired))
    return result if artifact.has_ptx else replace(result, scope=QUICK, assumptions=(NO_PTX,))


def _figures(
    artifact: Artifact, read: cubin.Cubin, sass: Counter[str], paired: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "registers": read.registers,
        "stack_bytes": read.stack_bytes,
        "local_memory_instructions": sass["LDL"] + sass["STL"],
        "static_shared_bytes": read.static_shared_bytes,
        "dynamic_shared_bytes": artifact.kernel.launch.dynamic_shared_bytes,
        "elf_flags": f"{elf_flags(artifact.cubin):#x}",
        "parameters": len(read.parameters),
        "paired_instructions": {name: count for name, count in sorted(paired.items()) if count},
    }


def _against_manifest(artifact: Artifact, read: cubin.Cubin, sass: Counter[str]) -> Iterator[str]:
    kernel, launch = artifact.kernel, artifact.kernel.launch
    listed = [(parameter.offset, parameter.size) for parameter in kernel.parameters]
    compared = (
        ("cubin sha256", artifact.cubin_sha256, kernel.cubin_sha256),
        ("ELF compute capability", read.compute_capability, compute_capability(kernel.arch)),
        ("cubin symbol", read.symbol, kernel.symbol),
        ("parameters in .nv.info", [(p.offset, p.size) for p in read.parameters], listed),
        ("registers", read.registers, kernel.resources.registers),
        ("stack bytes", read.stack_bytes, 0),
        ("stack bytes in the manifest", kernel.resources.stack_bytes, 0),
        ("spill bytes in the manifest", kernel.resources.spill_bytes, 0),
        ("local loads and stores", sass["LDL"] + sass["STL"], 0),
        ("static shared", read.static_shared_bytes, kernel.resources.static_shared_bytes),
        ("required block", read.required_block or launch.block, launch.block),
        ("required cluster", read.cluster or launch.cluster, launch.cluster),
        ("opcode counts", nvdisasm.watched(sass), dict(kernel.resources.opcodes)),
    )
    yield from _differences(compared)
    if prod(launch.block) > prod(read.max_block or launch.block):
        yield f"block {launch.block} is over the cubin's limit {read.max_block}"


def _between_manifest_and_ptx(artifact: Artifact, ptx: Kernel) -> Iterator[str]:
    kernel = artifact.kernel
    sizes = [parameter.size for parameter in kernel.parameters]
    yield from _differences(
        (
            ("PTX sha256", artifact.ptx_sha256, kernel.ptx_sha256),
            ("PTX .target", ptx.target, kernel.arch),
            ("PTX symbol", ptx.name, kernel.symbol),
            ("parameter sizes in the PTX", [p.size for p in ptx.parameters], sizes),
        )
    )


def _differences(compared: Iterable[tuple[str, object, object]]) -> Iterator[str]:
    for what, got, expected in compared:
        if got != expected:
            yield f"{what}: {got}, expected {expected}"


def _pairing_problems(paired: Mapping[str, int], sass: Counter[str]) -> Iterator[str]:
    for pairing in PAIRINGS:
        in_ptx = paired[pairing.ptx]
        found = sum(count for name, count in sass.items() if re.fullmatch(pairing.sass, name))
        if found != in_ptx if pairing.exact else in_ptx and not found:
            relation = "as many" if pairing.exact else "some"
            yield (
                f"{in_ptx} {pairing.ptx} in the PTX, {found} of {pairing.sass} in the SASS: "
                f"expected {relation}"
            )


def _count(ptx: Kernel, prefix: str) -> int:
    """Count an opcode with any further modifiers: "st.async" includes "st.async.shared"."""
    return sum(f"{item.opcode}.".startswith(f"{prefix}.") for item in ptx.instructions)


def elf_flags(data: bytes) -> int:
    """Return e_flags of a 64-bit ELF header: 0x600640a for sm_100a by toolkit 12.9."""
    (flags,) = struct.unpack_from("<I", data, _ELF_FLAGS_OFFSET)
    return int(flags)


def _describe(figures: Mapping[str, Any]) -> Iterator[str]:
    yield f"{figures['registers']} regs"
    if paired := sum(figures["paired_instructions"].values()):
        yield f"{paired} pairs"


RUNG = Rung(
    name="structure",
    climbs=(climb,),
    checker=Checker(number=1, tool="nvidia-cuda-nvdisasm"),
    reads=Reads.FILES,
    cost=1,
    describe=_describe,
    figures={
        "registers": JsonNode.integer,
        "paired_instructions": lambda node: node.mapping(JsonNode.integer, keys=r".*"),
    },
)
