"""Measure what budgets are about: the kernels, the wheel, the runtime's start, a bench's times."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from build_kernels.bench.report import BEHIND, COLD, EAGER, OURS, WARM, Report
from build_kernels.binaries.nvdisasm import LOCAL_OPCODES
from build_kernels.building.router_wheel import read_wheel
from dsv4_router_runtime.artifacts.folder import ArtifactSet

from .budgets import GPU, KERNELS, PACKAGE, BudgetError, Measured, Place

# Tensor cores and their memory; TMA; barriers of memory, CTA and cluster.
OPCODES = (
    *("HGMMA", "UTCHMMA", "LDTM", "UTCATOMSWS", "UTMALDG", "UTMASTG"),
    *("SYNCS", "UTCBAR", "BAR", "UCGABAR_ARV", "UCGABAR_WAIT"),
)
_PROCESSES = 5
_SECONDS = 60
# Times of the processor: other work on the machine does not count.
_START = """
import json, sys, time
began = time.process_time()
import dsv4_router_runtime
imported = time.process_time()
from dsv4_router_runtime.artifacts.folder import open_artifacts
artifacts = open_artifacts(sys.argv[1])
for kernel in artifacts.manifest.kernels:
    artifacts.read(kernel)
print(json.dumps([1000 * (imported - began), 1000 * (time.process_time() - imported)]))
"""


def kernel_numbers(artifacts: ArtifactSet) -> dict[Place, Measured]:
    """Return the resources, opcode counts and cubin bytes of each kernel, its cubin checked."""
    numbers: dict[Place, Measured] = {}
    for kernel in artifacts.manifest.kernels:
        resources, opcodes = kernel.resources, kernel.resources.opcodes
        found = {
            "registers": resources.registers,
            "spill_bytes": resources.spill_bytes,
            "stack_bytes": resources.stack_bytes,
            "local_instructions": sum(opcodes.get(name, 0) for name in LOCAL_OPCODES),
            "static_shared_bytes": resources.static_shared_bytes,
            "dynamic_shared_bytes": kernel.launch.dynamic_shared_bytes,
            "cubin_bytes": len(artifacts.read(kernel)),
        }
        found |= {name: opcodes[name] for name in OPCODES if opcodes.get(name)}
        for name, value in found.items():
            numbers[KERNELS, kernel.name, kernel.arch, name] = Measured(value=value)
    return numbers


def wheel_numbers(wheel: Path) -> dict[Place, Measured]:
    """Return the bytes of a wheel; WheelError unless it is one of dsv4-router."""
    read_wheel(wheel)
    return {(PACKAGE, "wheel_bytes"): Measured(value=wheel.stat().st_size)}


def start_numbers(folder: Path) -> dict[Place, Measured]:
    """Return the milliseconds of the runtime's import, and of opening a set and checking all of it.

    Each is the median of several new processes; a first one fills the caches and does not count.
    """
    times = [_start(folder) for _ in range(_PROCESSES + 1)][1:]
    pairs = zip(("import_ms", "load_ms"), zip(*times, strict=True), strict=True)
    return {
        (PACKAGE, name): Measured(value=round(statistics.median(column), 1))
        for name, column in pairs
    }


def _start(folder: Path) -> tuple[float, float]:
    import dsv4_router_runtime

    place = str(Path(dsv4_router_runtime.__file__).resolve().parents[1])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _START, folder.resolve()],
            env={**os.environ, "PYTHONPATH": place},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().rpartition("\n")[2]
        raise BudgetError(f"the runtime does not load {folder}: {last}") from error
    except subprocess.TimeoutExpired as error:
        raise BudgetError(f"the runtime took more than {_SECONDS} s to load {folder}") from error
    imported, loaded = json.loads(done.stdout)
    return imported, loaded


def gpu_numbers(report: Report) -> dict[Place, Measured]:
    """Return the times of this project's kernels on the GPU in a bench's report.

    A budget is the upper quartile of the run that set it. A run exceeds it if its lower quartile
    lies above: the noise of both runs is their own.
    """
    (ours,) = report.of_role(OURS)
    return {
        (
            GPU,
            report.machine.gpu,
            f"{figure.shape} {figure.mode}",
            str(figure.num_tokens),
        ): Measured(value=round(figure.high, 3), low=figure.low)
        for figure in report.figures
        if figure.contender == ours
        and figure.mode in (COLD, WARM, EAGER, *BEHIND)
        and figure.high is not None
    }
