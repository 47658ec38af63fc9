"""Checks of the installation: the packages, the artifacts, their evidence. They use no GPU."""

from __future__ import annotations

import ast
import platform
import re
from collections.abc import Callable, Collection
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from dsv4_router_runtime.artifacts.dispatch import kernels_on
from dsv4_router_runtime.artifacts.evidence import FAILED, HARDWARE, PASSED, read_summary
from dsv4_router_runtime.artifacts.folder import ArtifactSet, find_artifacts, open_artifacts
from dsv4_router_runtime.artifacts.trust import TRUST_VARIABLE
from dsv4_router_runtime.device import driver
from dsv4_router_runtime.errors import (
    CHECKOUT_FOLDER,
    REINSTALL_COMMAND,
    WHEEL_FOLDER,
    ArtifactError,
    ManifestError,
    TrustError,
)
from dsv4_router_runtime.version import DISTRIBUTION, package_version

from .finding import Finding, artifact_failure, fail, guarded, ok, skip, warn

WHOLE_SET = "a manifest of this runtime's schema and the cubins that it lists, unaltered"
_WHY = {
    WHEEL_FOLDER: "the installed package's own",
    CHECKOUT_FOLDER: "beside the package of a checkout",
}
_SEES_GPU = "a torch that sees the GPU"
_TORCH_FOR_CUDA = "install a torch that is built for CUDA: https://pytorch.org"
_GPU_TESTS = "in a checkout with these artifacts: python -m pytest -m gpu --record records.json"


def check_packages() -> list[Finding]:
    """Report the versions of this package, Python, cuda-bindings and torch."""
    here = f"dsv4-router {package_version()}, Python {platform.python_version()}"
    return [
        ok("package", f"{here}, {platform.system()} {platform.machine()}"),
        _requirement("cuda-bindings", "the driver is reached through it", fail),
        _requirement("torch", "a Router takes torch's tensors", warn),
    ]


def _requirement(name: str, reason: str, without_it: Callable[..., Finding]) -> Finding:
    needed = _required(name)
    bounds = f"{name}{needed}"
    repair = f"pip install '{bounds}'"
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        needed = f"{bounds}, since {reason}"
        return without_it(f"package {name}", "not installed", needed=needed, repair=repair)
    if not _within(found, needed):
        return warn(f"package {name}", found, needed=bounds, repair=repair)
    return ok(f"package {name}", found, needed=bounds if needed else "")


def _required(name: str) -> str:
    """Return the bounds that this distribution's metadata states; "" if it has no metadata."""
    try:
        stated = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ""
    found = (
        re.fullmatch(rf"{name}([<>=!~0-9.,]*)(;.*)?", each.replace(" ", "")) for each in stated
    )
    return next((each.group(1) for each in found if each), "")


def _within(version: str, bounds: str) -> bool:
    """Return whether a version is within bounds such as "<14,>=12.9"; other operators pass."""
    have = _numbers(version)
    for operator, text in re.findall(r"(>=|<)([0-9.]+)", bounds):
        if (have >= _numbers(text)) != (operator == ">="):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def check_torch(*, import_it: bool) -> Finding:
    """Check that torch sees the GPU that the driver sees: by its build, or by importing it."""
    if find_spec("torch") is None:
        return skip("torch", "not installed", repair="pip install 'dsv4-router[torch]'")
    look = _import_torch if import_it else _read_torch
    return guarded("torch", look, needed=_SEES_GPU, repair=_TORCH_FOR_CUDA)


def _read_torch() -> Finding:
    cuda = cuda_of_torch()
    if cuda is None:
        found = "torch is built without CUDA and sees no GPU, and the driver does"
        return fail("torch", found, needed=_SEES_GPU, repair=_TORCH_FOR_CUDA)
    major = driver.driver_version() // 1000
    if int(cuda.partition(".")[0]) > major:
        found = f"torch is built for CUDA {cuda}, and the driver is of CUDA {major}"
        return fail("torch", found, needed=_SEES_GPU, repair=f"{_TORCH_FOR_CUDA}, {major}.x")
    return ok("torch", f"built for CUDA {cuda}; not imported without --torch", needed=_SEES_GPU)


def cuda_of_torch() -> str | None:
    """Return the CUDA version that torch is built for; None if for none, ImportError if not said.

    It stands in torch/version.py, which is read and not executed: importing torch takes seconds.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ImportError("torch: expected a package with an __init__.py (got none)")
    path = Path(spec.origin).with_name("version.py")
    try:
        for line in ast.parse(path.read_bytes()).body:
            match line:
                case (
                    ast.Assign(targets=[ast.Name(id="cuda")], value=value)
                    | ast.AnnAssign(target=ast.Name(id="cuda"), value=ast.expr() as value)
                ):
                    return ast.literal_eval(value)
    except (OSError, SyntaxError, ValueError) as error:
        raise ImportError(f"{path}: cannot be read: {error}") from error
    raise ImportError(f"{path}: expected a line `cuda = ...` (got none)")


def _import_torch() -> Finding:
    torch = import_module("torch")
    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} sees no GPU, and the driver does"
        return fail("torch", found, needed=_SEES_GPU, repair=_TORCH_FOR_CUDA)
    return ok("torch", f"{torch.__version__} sees the GPU", needed=_SEES_GPU)


def check_artifacts(folder: Path | None) -> tuple[ArtifactSet | None, list[Finding]]:
    """Open the set and read every cubin; the findings have the folder and who signed it."""
    try:
        place = find_artifacts() if folder is None else folder
        artifacts = open_artifacts(place)
        for kernel in artifacts.manifest.kernels:
            artifacts.read(kernel)
    except TrustError as error:
        needed = "artifacts that the trust policy accepts"
        refused = artifact_failure("signature", error, needed=needed)
        return None, [skip("artifacts", "not used, as the trust policy refuses them"), refused]
    except (ArtifactError, ManifestError) as error:
        return None, [artifact_failure("artifacts", error, needed=WHOLE_SET)]
    why = "named by --artifacts" if folder else _WHY[place.name]
    kernels = artifacts.manifest.kernels
    archs = ", ".join(sorted({kernel.arch for kernel in kernels}))
    found = f"{place} ({why}): {len(kernels)} kernels for {archs}, every hash right"
    signature = "; ".join(artifacts.trusted) or f"not asked for: {TRUST_VARIABLE} is not set"
    return artifacts, [ok("artifacts", found), ok("signature", signature)]


def check_evidence(artifacts: ArtifactSet, archs: Collection[str]) -> list[Finding]:
    """Judge the evidence of the kernels that run on `archs`, or of every kernel if it is empty."""
    built = {each.arch for each in artifacts.manifest.kernels}
    run_here = {arch for arch in archs if kernels_on(artifacts.manifest, arch)}
    needed = "no failed rung, and a passed run on such a GPU"
    return [
        guarded(
            f"evidence {arch}",
            lambda arch=arch: _evidence_of(artifacts, arch, needed),  # type: ignore[misc]
            needed=needed,
            repair="build-kernels verify",
        )
        for arch in sorted(run_here if archs else built)
    ]


def _evidence_of(artifacts: ArtifactSet, arch: str, needed: str) -> Finding:
    check = f"evidence {arch}"
    kernels = kernels_on(artifacts.manifest, arch)
    summary = read_summary(artifacts.folder)
    known = {kernel.key: summary.of(kernel) for kernel in kernels}
    installed = artifacts.folder.name == WHEEL_FOLDER
    verify = REINSTALL_COMMAND if installed else "build-kernels verify"
    missing = [key for key, evidence in known.items() if evidence is None]
    if missing:
        found = f"none for the bytes and the launch of {_listed(missing)}"
        return warn(check, found, needed=needed, repair=verify)
    of = {key: evidence for key, evidence in known.items() if evidence is not None}
    failed = [f"{key} {', '.join(rungs)}" for key in of if (rungs := of[key].with_status(FAILED))]
    if failed:
        return fail(check, f"failed: {_listed(failed)}", needed=needed, repair=verify)
    not_run = [key for key in of if HARDWARE not in of[key].with_status(PASSED)]
    if not_run:
        found = f"not run on a GPU of {arch}: {_listed(not_run)}"
        return warn(check, found, needed=needed, repair=_GPU_TESTS)
    gpus = ", ".join(sorted({gpu for evidence in of.values() for gpu in evidence.gpus}))
    return ok(check, f"{len(of)} kernels, no rung failed, passed on {gpus}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
