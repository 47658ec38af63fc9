"""Group artifacts into the tasks of the process pool, one climb per task.

A rung that reads the PTX and the launch alone climbs once for kernels that are launched alike and
differ in the `.target` line of their PTX only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from build_kernels.workers import WorkerDiedError
from dsv4_router_runtime.artifacts.manifest import Kernel

from .artifact import Artifact
from .result import FAILED, NOT_RUN, Result, not_run
from .rungs import RUNGS
from .rungs.rung import Reads
from .store import Evidence

# Rung, kernel name, and the inputs that the kernels of one climb share.
Task = tuple[str, str, str]


def make_tasks(
    loaded: Sequence[Artifact], named: Sequence[str], evidence: Evidence
) -> dict[Task, list[Kernel]]:
    """Group the kernels that one climb of a rung serves, the longest rungs first.

    named: the rungs named in the command; empty requests all. A rung that cannot be climbed here is
    left out if evidence is stored, so that it stands: GPU tests, and unless it was named a rung
    that reads the PTX of a set without PTX.
    """
    tasks: dict[Task, list[Kernel]] = {}
    # The longest first, so that the pool does not end on one long task.
    for rung in sorted(RUNGS.values(), key=lambda rung: -rung.cost):
        for artifact in loaded if not named or rung.name in named else ():
            kernel = artifact.kernel
            reads_ptx = rung.reads is Reads.TEXT_AND_LAUNCH
            lacks_ptx = reads_ptx and not artifact.has_ptx and not named
            beyond = rung.reads is Reads.RECORDS or lacks_ptx
            if not (beyond and rung.name in evidence.of(kernel)):
                shares = reads_ptx and artifact.has_ptx
                same = text_and_launch(artifact) if shares else kernel.key
                tasks.setdefault((rung.name, kernel.name, same), []).append(kernel)
    return tasks


def join_parts(rung: str, parts: Sequence[Result | WorkerDiedError]) -> Result | WorkerDiedError:
    """Return the result of all parts of a climb: the worst one, or all figures if all passed."""
    for part in parts:
        if isinstance(part, WorkerDiedError):
            return part
    results = [part for part in parts if isinstance(part, Result)]
    for status in (FAILED, NOT_RUN):
        for result in results:
            if result.status == status:
                return result
    return replace(results[0], figures=RUNGS[rung].join([result.figures for result in results]))


def results_by_kernel(
    kernels: Sequence[Kernel], found: Result | WorkerDiedError
) -> Iterator[tuple[Kernel, Result]]:
    """Give each kernel of a task the result that was found on the first of them."""
    first, *twins = kernels
    result = not_run(str(found)) if isinstance(found, WorkerDiedError) else found
    yield first, result
    note = f"climbed on the PTX for {first.arch}, which differs in its .target line alone"
    for twin in twins:
        yield twin, replace(result, assumptions=(*result.assumptions, note))


def text_and_launch(artifact: Artifact) -> str:
    """Return all inputs of the rungs that read the PTX and the launch."""
    kernel = artifact.kernel
    ptx = artifact.ptx.replace(f".target {kernel.arch}", ".target", 1)
    return repr((ptx, kernel.launch, kernel.parameters, kernel.problem))
