"""Print the table mutant x rung and fail if a fault survives: `python -m build_kernels.mutants`."""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click

from build_kernels.cli.console import say, stop_like_interrupt
from build_kernels.cli.errors import reported_errors
from build_kernels.cli.extras import why_missing
from build_kernels.cli.options import (
    arch_option,
    artifacts_option,
    jobs_option,
    json_option,
    kernel_option,
)
from build_kernels.evidence.artifact import NO_PTX, ArtifactReadError, carries_ptx, load_artifact
from build_kernels.evidence.rungs import RUNGS
from build_kernels.workers import WorkerDiedError, run_tasks
from dsv4_router_runtime.artifacts.folder import find_artifacts, open_artifacts
from dsv4_router_runtime.errors import RouterError

from . import faults
from .judge import ACCEPTED, JUDGES, REJECTED, UNDECIDED, Verdict, is_right, judge
from .mutant import Mutant, MutantError

Verdicts = dict[tuple[str, str], Verdict]


@click.command("mutants")
@click.option(
    "--rung",
    "rungs",
    multiple=True,
    type=click.Choice(tuple(JUDGES)),
    help="Climb only this rung; repeatable. Default: each mutant's own, the ones to reject it.",
)
@click.option("--only", multiple=True, help="Only mutants whose name contains this; repeatable.")
@click.option(
    "--operators",
    is_flag=True,
    help="Mutate every instruction of the kernels by operators; the emulated rung judges.",
)
@kernel_option
@arch_option
@click.option(
    "--quick",
    is_flag=True,
    help="With --operators: the quick cases, one kernel per role, 40 mutants of each.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    help="With --operators: judge so many mutants per kernel, at random. Default: all.",
)
@click.option(
    "--seed", default=0, help="With --operators: of the random choice.", show_default=True
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --operators: the file of verdicts to go on with and to add to. "
    "Default: .artifacts.mutants.jsonl beside the folder artifacts.",
)
@artifacts_option(
    "The folder of built kernels and their PTX. Default: artifacts/ of this checkout."
)
@jobs_option
@json_option
def mutants_command(
    rungs: tuple[str, ...],
    only: tuple[str, ...],
    operators: bool,
    names: tuple[str, ...],
    archs: tuple[str, ...],
    quick: bool,
    sample: int | None,
    seed: int,
    results: Path | None,
    artifacts: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Put known faults into the built PTX and show which rung rejects each.

    The emulated rung must accept a mutant that is stated to be harmless. Fails if a fault, or with
    --operators a mutant without a reason in equivalents.toml, survives.
    """
    processes = jobs or len(os.sched_getaffinity(0))
    if operators:
        if rungs:
            raise click.UsageError("--operators: the emulated rung judges; leave --rung out")
        require_packages({"emulated"})
        from .operators.command import Choice, run_operators

        choice = Choice(
            kernels=names, archs=archs, only=only, quick=quick, sample=sample, seed=seed
        )
        stop_like_interrupt()
        with reported_errors():
            folder = artifacts or find_artifacts()
            require_ptx(folder)
            run_operators(folder, choice, results=results, jobs=processes, as_json=as_json)
        return
    if names or archs or quick or sample is not None or seed or results:
        raise click.UsageError(
            "--kernel, --arch, --quick, --sample, --seed and --results go with --operators"
        )
    run_listed(only, rungs, artifacts, processes, as_json=as_json)


def run_listed(
    only: Sequence[str],
    rungs: Sequence[str],
    artifacts: Path | None,
    processes: int,
    *,
    as_json: bool,
) -> None:
    """Judge the mutants of `faults` and print the table; exit 1 if one is not as it must be."""
    started = time.monotonic()
    chosen = choose(only)
    tasks = [(mutant, rung) for mutant in chosen for rung in rungs or own_rungs(mutant)]
    require_packages({rung for _, rung in tasks})
    verdicts: Verdicts = {}

    def on_verdict(verdict: Verdict) -> None:
        verdicts[verdict.mutant, verdict.rung] = verdict
        why = f": {verdict.reason}" if verdict.word == UNDECIDED else ""
        done = f"[{len(verdicts)}/{len(tasks)}]"
        say(f"{done} {verdict.word} by {verdict.rung}: {verdict.mutant}{why}")

    stop_like_interrupt()
    interrupted = False
    try:
        folder = artifacts or find_artifacts()
        require_ptx(folder)
        judge_all(folder, tasks, jobs=processes, on_verdict=on_verdict)
    except (ArtifactReadError, RouterError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        interrupted = True
        tasks = [(mutant, rung) for mutant, rung in tasks if (mutant.name, rung) in verdicts]
        chosen = [mutant for mutant in chosen if any(mutant.name == name for name, _ in verdicts)]
    if as_json:
        print(json.dumps([row(mutant, verdicts) for mutant in chosen], indent=1))
    else:
        print("\n".join(table(chosen, verdicts)))
        seconds = round(time.monotonic() - started)
        print(f"\n{summary(chosen, verdicts)}; {seconds} s in {processes} processes")
    wrong = [(m.name, rung) for m, rung in tasks if not is_right(m, verdicts[m.name, rung])]
    for name, rung in wrong:
        say(f"not as it must be, by {rung}: {name}")
    if interrupted:
        say(f"interrupted; these are the {len(verdicts)} verdicts until then")
        sys.exit(130)
    if wrong:
        sys.exit(1)


def choose(only: Sequence[str]) -> list[Mutant]:
    """Return the mutants whose name contains one of `only`, all if it is empty.

    UsageError if one of `only` is in no name: a typing error must not pass as "0 of 0 rejected".
    """
    names = [mutant.name for mutant in faults.MUTANTS]
    for part in only:
        if not any(part in name for name in names):
            near = difflib.get_close_matches(part, names, n=5, cutoff=0.3)
            listed = "".join(f"\n  {name}" for name in near or names)
            raise click.UsageError(
                f"--only {part!r}: no mutant's name contains it; the nearest are:{listed}"
            )
    return [m for m in faults.MUTANTS if not only or any(part in m.name for part in only)]


def require_packages(rungs: Collection[str]) -> None:
    """Exit and name the missing extra for these rungs, before any process starts."""
    for rung in rungs:
        for package in RUNGS[rung].packages:
            if (problem := why_missing(package)) is not None:
                say(f"error: the {rung} rung: {problem}")
                sys.exit(1)


def require_ptx(folder: Path) -> None:
    """Raise an error unless the folder is a set of kernels with their PTX."""
    open_artifacts(folder)
    if not carries_ptx(folder):
        raise ArtifactReadError(f"{folder}: {NO_PTX}")


def own_rungs(mutant: Mutant) -> tuple[str, ...]:
    """Return the rungs that must reject a mutant, or the one that must accept a harmless one."""
    return mutant.rejected_by or ("emulated",)


def judge_all(
    folder: Path,
    tasks: Sequence[tuple[Mutant, str]],
    *,
    jobs: int,
    on_verdict: Callable[[Verdict], None],
) -> None:
    """Call `on_verdict` with each verdict when it is found. The longest rung starts first."""
    in_order = sorted(tasks, key=lambda pair: -RUNGS[pair[1]].cost)
    calls = {(mutant.name, rung): (folder, mutant.name, rung) for mutant, rung in in_order}
    with run_tasks(judge_one, calls, jobs=jobs) as verdicts:
        for (name, rung), verdict in verdicts:
            if isinstance(verdict, WorkerDiedError):
                verdict = Verdict(mutant=name, rung=rung, word=UNDECIDED, reason=str(verdict))
            on_verdict(verdict)


def judge_one(folder: Path, name: str, rung: str) -> Verdict:
    """Return one verdict, in a process of the pool, which finds the mutant by its name."""
    (mutant,) = (mutant for mutant in faults.MUTANTS if mutant.name == name)
    try:
        return judge(mutant, load_artifact(folder, mutant.artifact), rung)
    except MutantError as error:
        return Verdict(mutant=name, rung=rung, word=UNDECIDED, reason=str(error))


def row(mutant: Mutant, verdicts: Verdicts) -> dict[str, Any]:
    """Return a mutant and its verdicts, for JSON."""
    said = {rung: verdicts[mutant.name, rung] for rung in JUDGES if (mutant.name, rung) in verdicts}
    return {
        "mutant": mutant.name,
        "class": mutant.kind,
        "artifact": mutant.artifact,
        "rejected_by": list(mutant.rejected_by),
        "harmless": mutant.harmless,
        "verdicts": {
            rung: {"word": verdict.word, "reason": verdict.reason} for rung, verdict in said.items()
        },
    }


def table(mutants: Sequence[Mutant], verdicts: Verdicts) -> list[str]:
    """Return plain text to keep in a file, a line per mutant, without schedules."""
    rows: list[tuple[str, ...]] = [("mutant", "class", "kernel", *JUDGES)]
    for mutant in mutants:
        words = []
        for rung in JUDGES:
            verdict = verdicts.get((mutant.name, rung))
            words.append(verdict.word if verdict else "")
        rows.append((mutant.name, mutant.kind, mutant.artifact, *words))
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    proofs = [f"{mutant.name}: {mutant.harmless}." for mutant in mutants if mutant.harmless]
    return [*lines, "", "Harmless, and accepted:", *proofs] if proofs else lines


def summary(mutants: Sequence[Mutant], verdicts: Verdicts) -> str:
    """Count the faults, their classes and the verdicts."""
    faulty = [mutant for mutant in mutants if not mutant.harmless]
    words = {
        mutant.name: {verdicts[pair].word for pair in verdicts if pair[0] == mutant.name}
        for mutant in mutants
    }
    rejected = sum(REJECTED in words[mutant.name] for mutant in faulty)
    accepted = sum(words[m.name] == {ACCEPTED} for m in mutants if m.harmless)
    return (
        f"{rejected} of {len(faulty)} faults rejected, of {len({m.kind for m in faulty})} classes; "
        f"{accepted} of {len(mutants) - len(faulty)} harmless changes accepted"
    )
