"""`python -m dsv4_router_runtime doctor`: whether this machine can route, and the repair."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dsv4_router_runtime.artifacts.dispatch import kernels_on
from dsv4_router_runtime.artifacts.folder import MANIFEST_NAME, ArtifactSet
from dsv4_router_runtime.device.facts import Gpu
from dsv4_router_runtime.errors import NoKernelError, repair_command

from .finding import COMMAND, RIGHT_OUTPUTS, Finding, fail, guarded, out_of_service, skip
from .installation import check_artifacts, check_evidence, check_packages, check_torch
from .kernels import check_kernels
from .machine import check_driver, check_environment, check_floor, check_gpu, see_gpus


def examine(
    *,
    device: int | None = None,
    quick: bool = False,
    import_torch: bool = False,
    artifacts: Path | None = None,
) -> list[Finding]:
    """Run every check and return the findings in the order of their causes.

    device: the one GPU to check; without it, all GPUs, and the kernels on one GPU of each kind.
    quick: leave the self-test out. import_torch: ask torch itself whether it sees the GPU, if the
    driver does; it takes seconds.
    """
    findings = check_packages()
    opened, found = check_artifacts(artifacts)
    findings += [*found, *check_environment()]
    runs, finding = check_driver()
    findings.append(finding)
    gpus: list[Gpu] = []
    if runs:
        gpus, missing = see_gpus(device)
        findings += missing
    archs = sorted({gpu.arch for gpu in gpus})
    if opened is not None:
        findings += check_evidence(opened, archs)
        findings += [check_floor(opened, arch) for arch in archs]
    findings += [check_gpu(gpu, opened) for gpu in gpus]
    if gpus:
        findings.append(check_torch(import_it=import_torch))
    if not gpus:
        findings.append(skip("kernels", "no GPU to load them on"))
    elif opened is None:
        findings.append(skip("kernels", "no artifacts to load"))
    else:
        findings += _check_on_gpus(opened, gpus, quick)
    return findings


def _check_on_gpus(artifacts: ArtifactSet, gpus: list[Gpu], quick: bool) -> Iterator[Finding]:
    """Load the kernels and run the self-test on one GPU of each kind."""
    first: dict[tuple[object, ...], int] = {}
    for gpu in gpus:
        like = first.setdefault(gpu.kind, gpu.index)
        if like != gpu.index:
            again = f"{COMMAND} doctor --device {gpu.index}"
            yield skip(f"kernels gpu {gpu.index}", f"checked on GPU {like}, which is alike", again)
            continue
        yield from check_kernels(artifacts, gpu)
        check = f"self-test gpu {gpu.index}"
        if quick:
            yield skip(check, "left out by --quick")
        elif kernels_on(artifacts.manifest, gpu.arch):
            yield from _test(artifacts, gpu.index)


def _test(artifacts: ArtifactSet, index: int) -> Iterator[Finding]:
    # Imported here: without a GPU it is not needed.
    from .selftest import check_workspace, self_test

    repair = out_of_service(index)
    check = f"self-test gpu {index}"

    def route() -> Finding:
        try:
            return self_test(artifacts, index)
        # The set lacks a kernel; the GPU has done nothing wrong.
        except NoKernelError as error:
            found, needed = str(error).partition(";")[0], "a kernel for each step of a layer"
            build = repair_command(str(artifacts.folder / MANIFEST_NAME))
            return fail(check, found, needed=needed, repair=build)

    yield guarded(check, route, needed=RIGHT_OUTPUTS, repair=repair)
    check, needed = f"workspace gpu {index}", "scratch that every launch leaves zero"
    yield guarded(check, partial(check_workspace, index), needed=needed, repair=repair)
