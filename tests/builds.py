"""Sets of kernels for the tests; a build of router_topk takes a fraction of a second.

A module that imports this one is skipped where the compilers are not installed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import pytest

from build_kernels.binaries.nvdisasm import sass_opcodes, sass_opcodes_of
from build_kernels.building import build, compilers
from build_kernels.building.build import Built, Report, run_build
from build_kernels.building.plan import Task, file_names, make_plan
from build_kernels.specs import ARCHITECTURES, KERNELS, CudaSource
from dsv4_router_runtime.artifacts.folder import open_artifacts

CHECKOUT = Path(__file__).parents[1] / "artifacts"
try:
    compilers.toolchain_versions()
except compilers.CompileError as error:
    pytest.skip(f"not run: {error}", allow_module_level=True)
COMPILE_ALL, NVRTC_COMPILE = build._compile_all, compilers.nvrtc_compile
ARCHS = tuple(arch.name for arch in ARCHITECTURES)
TOPK = next(spec for spec in KERNELS if isinstance(spec.source, CudaSource))
DECODE = next(spec for spec in KERNELS if not isinstance(spec.source, CudaSource))


def make(
    artifacts: Path, names: Sequence[str] = (TOPK.name,), archs: Sequence[str] = ARCHS, **options
) -> Report:
    return run_build(artifacts, make_plan(artifacts, names, archs), jobs=2, **options)


def _of_the_checkout() -> dict[str, Built]:
    """Return the checkout's kernels that the present sources made, by spec and architecture."""
    known = {}
    for entry in make_plan(CHECKOUT, [spec.name for spec in KERNELS], ARCHS).current:
        cubin, ptx = ((CHECKOUT / name).read_bytes() for name in file_names(entry))
        spec = next(spec for spec in KERNELS if spec.name == entry.name)
        known[repr((spec, entry.arch))] = Built(entry=entry, cubin=cubin, ptx=ptx.decode())
    return known


# Reading the metadata of all that is installed takes 22 ms of CPU, and each plan does it.
versions_once = cache(compilers.toolchain_versions)
# Read before a test changes a plan's inputs; compile_once adds to it.
COMPILED = _of_the_checkout()
DISASSEMBLED: dict[bytes, Counter[str]] = {}


def compile_once(
    tasks: Sequence[Task], folder: Path, jobs: int, on_done: Callable[[str], None]
) -> list[Built]:
    """Compile what was not compiled before; stands in for build._compile_all."""
    sources = [repr((task.spec, task.arch)) for task in tasks]
    new = {
        source: task for source, task in zip(sources, tasks, strict=True) if source not in COMPILED
    }
    with pytest.MonkeyPatch.context() as patch:
        # The DSL's compiler stays in a worker.
        if all(isinstance(task.spec.source, CudaSource) for task in new.values()):
            patch.setattr(build, "run_tasks", tasks_here)
        made = COMPILE_ALL(list(new.values()), folder, jobs, on_done)
    COMPILED.update(zip(new, made, strict=True))
    built = []
    for source, task in zip(sources, tasks, strict=True):
        before = COMPILED[source]
        built.append(replace(before, entry=replace(before.entry, source_digest=task.digest)))
        if source not in new:
            on_done(task.key)
    return built


@lru_cache
def _nvrtc(text: str, name: str, arch: str, defines: tuple[tuple[str, int], ...]):
    return NVRTC_COMPILE(text, name=name, arch=arch, defines=dict(defines))


def nvrtc_once(text: str, *, name: str, arch: str, defines: Mapping[str, int]):
    """Compile a text once; stands in for compilers.nvrtc_compile."""
    return _nvrtc(text, name, arch, tuple(defines.items()))


def sass_once(path: Path) -> Counter[str]:
    """Disassemble a file's bytes once; stands in for nvdisasm.sass_opcodes."""
    cubin = path.read_bytes()
    if cubin not in DISASSEMBLED:
        DISASSEMBLED[cubin] = sass_opcodes(path)
    return DISASSEMBLED[cubin]


def sass_of_once(codes: Sequence[bytes], arch: str) -> list[Counter[str]]:
    """Disassemble each kernel's code once; stands in for nvdisasm.sass_opcodes_of."""
    if new := [code for code in codes if code not in DISASSEMBLED]:
        DISASSEMBLED.update(zip(new, sass_opcodes_of(new, arch), strict=True))
    return [DISASSEMBLED[code] for code in codes]


@contextlib.contextmanager
def tasks_here(
    function: Callable, tasks: Mapping, *, jobs: int, prepare: object = None
) -> Iterator[Iterator[tuple[object, object]]]:
    """Call the tasks in this process; stands in for workers.run_tasks."""
    yield ((key, function(*arguments)) for key, arguments in tasks.items())


@lru_cache
def _pristine(names: tuple[str, ...], archs: tuple[str, ...]) -> Path:
    home = Path(tempfile.mkdtemp(prefix="dsv4-router-test-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compile_all", compile_once)
        make(home / "artifacts", names, archs)
    return home / "artifacts"


def kernel_set(folder: Path, names: Iterable[str], archs: Iterable[str]) -> Path:
    """A set of the kernels `names` for `archs`, as `folder`; the test's own, to spoil."""
    return Path(shutil.copytree(_pristine(tuple(names), tuple(archs)), folder))


def topk_set(folder: Path, archs: Iterable[str] = ARCHS) -> Path:
    return kernel_set(folder, [TOPK.name], archs)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_whole(folder: Path) -> None:
    """The runtime's own checks: closed set, hashes, architectures."""
    artifacts = open_artifacts(folder)
    assert artifacts.manifest.kernels
    for kernel in artifacts.manifest.kernels:
        artifacts.read(kernel)


def leftovers(artifacts: Path) -> list[str]:
    """What a build should not leave, in the folder and beside it. The lock may stay."""
    names = [*os.listdir(artifacts), *os.listdir(artifacts.parent)]
    return [name for name in names if name.startswith(".") and not name.endswith(".lock")]


@contextlib.contextmanager
def mounted(place: Path, *options: str, source: Path | None = None) -> Iterator[Path]:
    """Mount a new file system, or `source` with the option --bind, for real; skip if it cannot."""
    place.mkdir(exist_ok=True)
    kind = [] if source else ["-t", "tmpfs"]
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root and mount")
    command = ["mount", *kind, *options, str(source or "tmpfs"), str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
