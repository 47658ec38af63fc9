"""Make the manifest's entry of a kernel: read from its cubin, checked against its spec."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from math import prod

from build_kernels.binaries.cubin import Cubin, CubinParameter
from build_kernels.binaries.nvdisasm import LOCAL_OPCODES
from build_kernels.specs import KernelSpec
from dsv4_router_runtime.artifacts.kernel import (
    KIND_LAYOUT,
    Kernel,
    Launch,
    Parameter,
    Resources,
    compute_capability,
    cubin_name,
)
from dsv4_router_runtime.artifacts.limits import MAX_PORTABLE_CLUSTER_CTAS

from .compilers import Compiled


class EntryError(Exception):
    """A compiled kernel differs from its spec."""


def make_entry(
    spec: KernelSpec,
    arch: str,
    digest: str,
    compiled: Compiled,
    cubin: Cubin,
    opcodes: Mapping[str, int],
) -> Kernel:
    """Make the entry; EntryError if the cubin is not what the spec says."""
    _check("compute capability", cubin.compute_capability, compute_capability(arch))
    _check("symbol", cubin.symbol, spec.symbol)
    _check("block that the cubin requires", cubin.required_block or compiled.block, compiled.block)
    _check("block that the cubin is bounded to", cubin.max_block or compiled.block, compiled.block)
    _check("cluster of the cubin", cubin.cluster or spec.cluster, spec.cluster)
    _check_no_local_memory(cubin, opcodes)
    _check_parameter_names(spec, compiled)
    return Kernel(
        name=spec.name,
        arch=arch,
        role=spec.role,
        file=cubin_name(spec.name, arch),
        symbol=cubin.symbol,
        cubin_sha256=sha256(compiled.cubin),
        ptx_sha256=sha256(compiled.ptx.encode()),
        source_digest=digest,
        problem=spec.problem,
        launch=Launch(
            block=compiled.block,
            cluster=spec.cluster,
            grid=spec.grid,
            k_splits=spec.k_splits,
            expert_tile=spec.expert_tile,
            token_tile=spec.token_tile,
            dynamic_shared_bytes=compiled.dynamic_shared_bytes,
            pdl=spec.pdl,
            nonportable_cluster=prod(spec.cluster) > MAX_PORTABLE_CLUSTER_CTAS,
            max_clusters=spec.max_clusters,
            wait_limit_ms=spec.wait_limit_ms,
        ),
        parameters=make_parameters(spec, cubin.parameters),
        resources=Resources(
            registers=cubin.registers,
            spill_bytes=0,  # no local memory, so no spills: checked above
            stack_bytes=cubin.stack_bytes,
            static_shared_bytes=cubin.static_shared_bytes,
            opcodes=opcodes,
        ),
    )


def make_parameters(spec: KernelSpec, found: Sequence[CubinParameter]) -> tuple[Parameter, ...]:
    """Join a spec's names and kinds to a cubin's offsets and sizes; EntryError if they clash."""
    names = ", ".join(parameter.name for parameter in spec.parameters)
    if len(found) != len(spec.parameters):
        raise EntryError(
            f"parameters: the cubin has {len(found)}, the spec {len(spec.parameters)} ({names})"
        )
    parameters = []
    end = 0
    for wanted, actual in zip(spec.parameters, found, strict=True):
        size, alignment = KIND_LAYOUT[wanted.kind]
        offset = -(-end // alignment) * alignment
        _check(f"parameter {wanted.name}: size of a {wanted.kind}", actual.size, size)
        _check(f"parameter {wanted.name}: offset", actual.offset, offset)
        end = offset + size
        parameters.append(
            Parameter(
                name=wanted.name,
                kind=wanted.kind,
                offset=actual.offset,
                size=actual.size,
                element_type=wanted.element_type,
                scratch=wanted.scratch,
                tensor_map=wanted.tensor_map,
            )
        )
    return tuple(parameters)


def _check_parameter_names(spec: KernelSpec, compiled: Compiled) -> None:
    """Check that the source declares the spec's parameters in order and reads each one."""
    pairs = zip_longest(compiled.parameters, (item.name for item in spec.parameters))
    for index, (declared, wanted) in enumerate(pairs):
        if declared != wanted:
            raise EntryError(
                f"parameter {index}: the source declares {declared}, the spec {wanted}; "
                "the ABI's order is in dsv4_router_runtime/parameters.py"
            )
        # One mention is the declaration.
        if len(re.findall(rf"\b{re.escape(spec.symbol)}_param_{index}\b", compiled.ptx)) < 2:
            raise EntryError(f"parameter {wanted}: the kernel takes it and never reads it")


def _check(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise EntryError(f"{what}: the compiled kernel has {got}, the spec says {expected}")


def _check_no_local_memory(cubin: Cubin, opcodes: Mapping[str, int]) -> None:
    used = {opcode: opcodes[opcode] for opcode in LOCAL_OPCODES if opcodes[opcode]}
    if used or cubin.stack_bytes:
        raise EntryError(
            f"uses local memory: stack {cubin.stack_bytes} bytes, {used or 'no LDL or STL'}; "
            f"registers {cubin.registers}. Kernels are shipped without spills or local arrays"
        )


def sha256(data: bytes) -> str:
    """Return the hexadecimal digest that the manifest records."""
    return hashlib.sha256(data).hexdigest()
