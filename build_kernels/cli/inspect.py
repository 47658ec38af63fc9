"""`build-kernels inspect`: show the launch ABI, resources and opcode counts of built kernels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from dsv4_router_runtime.artifacts.folder import (
    MANIFEST_NAME,
    ArtifactSet,
    find_artifacts,
    open_artifacts,
)
from dsv4_router_runtime.artifacts.kernel import Kernel, Parameter, cubin_name
from dsv4_router_runtime.artifacts.manifest import serialise_manifest
from dsv4_router_runtime.errors import ArtifactError

from .console import results
from .errors import reported_errors
from .options import ARCH_NAMES, KernelName, arch_option, json_option, shown_option


@click.command("inspect")
@click.argument("kernels", type=KernelName(), metavar="KERNEL...", nargs=-1, required=True)
@arch_option
@shown_option
@json_option
def inspect_command(
    kernels: tuple[str, ...], archs: tuple[str, ...], artifacts: Path | None, as_json: bool
) -> None:
    """Show the launch ABI, resources and opcode counts of built kernels."""
    with reported_errors():
        opened = open_artifacts(artifacts or find_artifacts())
        entries = _built_entries(opened, kernels, archs)
    if as_json:
        document = json.loads(serialise_manifest(replace(opened.manifest, kernels=entries)))
        print(json.dumps(document["kernels"], indent=1, sort_keys=True))
        return
    for entry in entries:
        _print_entry(entry)


def _built_entries(
    artifacts: ArtifactSet, names: Sequence[str], archs: Sequence[str]
) -> tuple[Kernel, ...]:
    """Return the manifest's entries, cubins checked; of all architectures if none is named."""
    entries = {(entry.name, entry.arch): entry for entry in artifacts.manifest.kernels}
    chosen = [
        (name, arch)
        for name in dict.fromkeys(names)
        for arch in archs or [arch for known, arch in entries if known == name] or ARCH_NAMES
    ]
    for name, arch in chosen:
        if (name, arch) not in entries:
            raise ArtifactError(
                file=str(artifacts.folder / cubin_name(name, arch)),
                problem=f"not built: {MANIFEST_NAME} lists no {name}.{arch}",
            )
    found = tuple(entries[pair] for pair in chosen)
    for entry in found:
        artifacts.read(entry)
    return found


def _print_entry(entry: Kernel) -> None:
    launch, resources = entry.launch, entry.resources
    print(f"{entry.key}: {entry.symbol} in {entry.file}, sha256 {entry.cubin_sha256}")
    print(
        f"  launch: block {list(launch.block)}, grid {list(launch.grid)} CTAs, "
        f"cluster {list(launch.cluster)}, dynamic shared {launch.dynamic_shared_bytes} B, "
        f"at most {launch.max_clusters or 'any number of'} clusters, "
        f"PDL {'yes' if launch.pdl else 'no'}, wait limit {launch.wait_limit_ms} ms"
    )
    print(
        f"  resources: {resources.registers} registers, spills {resources.spill_bytes} B, "
        f"stack {resources.stack_bytes} B, static shared {resources.static_shared_bytes} B"
    )
    print("  opcodes: " + ", ".join(f"{name} {n}" for name, n in sorted(resources.opcodes.items())))
    table = Table()
    for heading in ("parameter", "kind", "offset", "size"):
        table.add_column(heading, no_wrap=True)
    table.add_column("contents")
    for parameter in entry.parameters:
        table.add_row(
            parameter.name,
            parameter.kind,
            str(parameter.offset),
            str(parameter.size),
            escape(_described(parameter)),
        )
    results(width=200).print(table)


def _described(parameter: Parameter) -> str:
    if parameter.tensor_map is not None:
        recipe = parameter.tensor_map
        return (
            f"{recipe.tensor} {recipe.element_type}, dims {', '.join(recipe.dims)}, "
            f"box {list(recipe.box)}, swizzle {recipe.swizzle}, L2 {recipe.l2_promotion}"
        )
    if parameter.scratch is not None:
        zeroed = ", zero between launches" if parameter.scratch.zeroed else ""
        return f"{parameter.element_type} scratch, {parameter.scratch.elements} elements{zeroed}"
    return parameter.element_type or ""
