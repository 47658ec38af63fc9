"""Run rows of the campaign: in the emulator, or by the tests that they name."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_kernels.evidence.artifact import Artifact, load_artifact
from build_kernels.evidence.tasks import text_and_launch
from build_kernels.workers import WorkerDiedError, run_tasks
from dsv4_router_runtime.artifacts.folder import open_artifacts

from .fault import Fault, Place
from .table import BY_NAME
from .trial import applies, together, try_faults

AS_EXPECTED, WRONG, NOT_RUN = "as expected", "not as expected", "not run"
ROOT = Path(__file__).parents[2]
TESTS_TAKE = 600  # seconds at most, for the tests of one row


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a fault. detail: the runs, or the reason for another status."""

    fault: str
    status: str
    detail: str


def test_command(fault: Fault) -> str:
    """Return the command that runs a row's tests; it needs the checkout."""
    marker = "not gpu" if fault.place is Place.CPU else "gpu"
    return shlex.join(["python", "-m", "pytest", "-m", marker, *fault.tests])


def run_faults(
    folder: Path,
    faults: Sequence[Fault],
    *,
    quick: bool,
    jobs: int,
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Call `on_outcome` with each outcome when all of the row's runs have ended.

    A row for the emulator runs on each kernel that it is about, in one process with the rows that
    share its launches; twins of the same PTX run once.
    """
    artifacts = _distinct(folder)
    calls: dict[tuple[tuple[str, ...], str], tuple[Path, tuple[str, ...], str, bool]] = {}
    for artifact in artifacts:
        key = artifact.kernel.key
        for group in together([fault for fault in faults if applies(fault, artifact, quick=quick)]):
            names = tuple(fault.name for fault in group)
            calls[names, key] = (folder, names, key, quick)
    begun = {name for names, _ in calls for name in names}
    for fault in faults:
        if fault.place is Place.CPU and fault.name not in begun:
            calls[(fault.name,), ""] = (folder, (fault.name,), "", quick)
    parts: dict[str, list[Outcome]] = {}
    with run_tasks(run_together, calls, jobs=jobs) as ended:
        for (names, key), outcomes in ended:
            if isinstance(outcomes, WorkerDiedError):
                detail = f"{key}: {outcomes}"
                outcomes = [Outcome(fault=name, status=WRONG, detail=detail) for name in names]
            for outcome in outcomes:
                name = outcome.fault
                parts.setdefault(name, []).append(outcome)
                if len(parts[name]) == sum(name in names for names, _ in calls):
                    on_outcome(_worst(parts[name]))
    for fault in faults:
        if fault.place is not Place.CPU:
            why = f"it needs {fault.place.value}: {test_command(fault)}"
            on_outcome(Outcome(fault=fault.name, status=NOT_RUN, detail=why))


def run_together(folder: Path, names: Sequence[str], key: str, quick: bool) -> list[Outcome]:
    """Run rows that share their launches in this process, on one kernel; or one row's tests."""
    faults = [BY_NAME[name] for name in names]
    if not key:
        return [_run_tests(fault) for fault in faults]
    try:
        trials = try_faults(faults, load_artifact(folder, key), quick=quick)
    except Exception as error:
        traceback.print_exc()
        detail = f"{key}: {type(error).__name__}: {error}"
        return [Outcome(fault=name, status=WRONG, detail=detail) for name in names]
    outcomes = []
    for name, trial in trials.items():
        status = WRONG if trial.problems else AS_EXPECTED
        detail = "; ".join(trial.problems[:3]) or f"{trial.runs} runs"
        outcomes.append(Outcome(fault=name, status=status, detail=f"{key}: {detail}"))
    return outcomes


def _run_tests(fault: Fault) -> Outcome:
    """Run the tests of a row in a process of their own; a skipped test shows nothing."""
    missing = [test for test in fault.tests if not (ROOT / test.partition("::")[0]).is_file()]
    if missing or not fault.tests:
        why = (
            f"the checkout has no {', '.join(missing)}"
            if missing
            else "no kernel that it is about, or only in a full run"
        )
        return Outcome(fault=fault.name, status=NOT_RUN, detail=why)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *fault.tests]
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=TESTS_TAKE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        detail = f"still running after {TESTS_TAKE} s: {test_command(fault)}"
        return Outcome(fault=fault.name, status=WRONG, detail=detail)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    if done.returncode:
        status = WRONG
    else:
        status = AS_EXPECTED if "passed" in last and "skipped" not in last else NOT_RUN
    return Outcome(fault=fault.name, status=status, detail=last)


def _distinct(folder: Path) -> list[Artifact]:
    """Load the kernels of a set, one of those whose PTX differs in its target line alone."""
    kernels = open_artifacts(folder).manifest.kernels
    found: dict[str, Artifact] = {}
    for kernel in kernels:
        artifact = load_artifact(folder, kernel.key)
        found.setdefault(text_and_launch(artifact), artifact)
    return list(found.values())


def _worst(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the worst outcome of a row, with the detail of one kernel and the number of others."""
    known = list(outcomes)
    status = next(s for s in (WRONG, NOT_RUN, AS_EXPECTED) if any(o.status == s for o in known))
    details = sorted(outcome.detail for outcome in known if outcome.status == status)
    others = f" ({status} on {len(details)} of {len(known)} kernels)" if len(known) > 1 else ""
    return Outcome(fault=known[0].fault, status=status, detail=details[0] + others)
