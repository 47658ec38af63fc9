"""`python -m dsv4_router_runtime doctor`: whether this machine can route, and the repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from dsv4_router_runtime.artifacts.dispatch import kernels_on
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.device.facts import Gpu, may_have_gpu

from .finding import COMMAND, RIGHT_OUTPUTS, Finding, guarded, out_of_service, skip
from .installation import check_artifacts, check_evidence, check_packages
from .kernels import check_kernels
from .machine import check_driver, check_environment, check_floor, check_gpu, see_gpus


def examine(
    *, device: int | None = None, quick: bool = False, artifacts: Path | None = None
) -> list[Finding]:
    """Run every check and return the findings in the order of their causes.

    device: the one GPU to check; without it, all GPUs, and the kernels on one GPU of each kind.
    quick: leave the self-test out. torch is imported only if there may be a GPU.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        # It takes seconds, in which this thread reads the artifacts and waits for the driver: it
        # starts, makes a context, and loads the kernels.
        import_torch = cache(lambda: pool.submit(import_module, "torch"))
        if may_have_gpu():
            import_torch()
        return _findings(device, quick, artifacts, import_torch)


def _findings(
    device: int | None,
    quick: bool,
    artifacts: Path | None,
    import_torch: Callable[[], Future[ModuleType]],
) -> list[Finding]:
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
    if not gpus:
        findings.append(skip("kernels", "no GPU to load them on"))
    elif opened is None:
        findings.append(skip("kernels", "no artifacts to load"))
    else:
        findings += _check_on_gpus(opened, gpus, quick, import_torch)
    return findings


def _check_on_gpus(
    artifacts: ArtifactSet,
    gpus: list[Gpu],
    quick: bool,
    import_torch: Callable[[], Future[ModuleType]],
) -> Iterator[Finding]:
    """Load the kernels and run the self-test on one GPU of each kind."""
    if find_spec("torch") is None:
        yield skip("kernels", "torch is not installed", repair="pip install 'dsv4-router[torch]'")
        return
    torch = import_torch()
    first: dict[tuple[object, ...], int] = {}
    for gpu in gpus:
        like = first.setdefault(gpu.kind, gpu.index)
        if like != gpu.index:
            again = f"{COMMAND} doctor --device {gpu.index}"
            yield skip(f"kernels gpu {gpu.index}", f"checked on GPU {like}, which is alike", again)
            continue
        yield from check_kernels(artifacts, gpu)
        if quick or kernels_on(artifacts.manifest, gpu.arch):
            yield from _test(artifacts, gpu.index, quick, torch)


def _test(
    artifacts: ArtifactSet, index: int, quick: bool, torch: Future[ModuleType]
) -> Iterator[Finding]:
    repair = out_of_service(index)

    def route() -> Finding:
        # Raises the import's error, with --quick too.
        torch.result()
        if quick:
            return skip(check, "left out by --quick")
        from .selftest import self_test

        return self_test(artifacts, index)

    check = f"self-test gpu {index}"
    yield guarded(check, route, needed=RIGHT_OUTPUTS, repair=repair)
    if quick:
        return

    def look() -> Finding:
        from .selftest import check_workspace

        return check_workspace(index)

    check, needed = f"workspace gpu {index}", "scratch that every launch leaves zero"
    yield guarded(check, look, needed=needed, repair=repair)
