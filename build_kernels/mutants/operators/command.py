"""Run `build-kernels mutants --operators`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from build_kernels.cli.console import say
from build_kernels.evidence.artifact import load_artifact
from build_kernels.evidence.result import FULL, QUICK
from dsv4_router_runtime.artifacts.folder import open_artifacts
from dsv4_router_runtime.artifacts.manifest import Kernel

from .judge import Verdict
from .mutation import Mutation, mutations_of, sample
from .ranges import facts_of
from .report import document, summary, survivors, table
from .results import Results
from .run import KernelMutants, counts, judge_waiting, one_per_role, settle

QUICK_SAMPLE = 40


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which mutants to judge, of which kernels; empty means all. sample: None for all."""

    kernels: Sequence[str]
    archs: Sequence[str]
    only: Sequence[str]
    quick: bool
    sample: int | None
    seed: int

    @property
    def scope(self) -> str:
        return QUICK if self.quick else FULL


def run_operators(
    folder: Path, choice: Choice, *, results: Path | None, jobs: int, as_json: bool
) -> None:
    """Judge the chosen mutants and print the table; exit 1 if one survives."""
    started = time.monotonic()
    kernels = [_mutants(folder, kernel, choice) for kernel in _kernels(folder, choice)]
    if choice.only and not any(each.chosen for each in kernels):
        raise click.UsageError(f"--only {choice.only}: no mutant's name contains it")
    kept = Results(results or folder.resolve().with_name(f".{folder.resolve().name}.mutants.jsonl"))
    waiting = settle(kernels, kept, choice.scope)
    todo, done = sum(map(len, waiting.values())), 0
    say(
        f"{sum(sum(each.counts.values()) for each in kernels)} mutants, "
        f"{sum(len(each.chosen) for each in kernels)} chosen, {todo} of them to judge"
    )

    def on_verdict(mutation: Mutation, verdict: Verdict) -> None:
        nonlocal done
        done += 1
        say(f"[{done}/{todo}] {verdict.word}: {mutation.name}: {verdict.reason[:160]}")

    interrupted = False
    try:
        judge_waiting(
            *(folder, kernels, waiting, kept),
            scope=choice.scope,
            jobs=jobs,
            on_verdict=on_verdict,
        )
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        print(json.dumps(document(kernels), indent=1))
    else:
        print("\n".join(table(kernels)))
        seconds = round(time.monotonic() - started)
        print(f"\n{summary(kernels)}; {seconds} s in {jobs} processes")
    if interrupted:
        say("interrupted; the same command goes on from here")
        sys.exit(130)
    if survivors(kernels):
        sys.exit(1)


def _kernels(folder: Path, choice: Choice) -> list[Kernel]:
    chosen = [
        kernel
        for kernel in open_artifacts(folder).manifest.kernels
        if (not choice.kernels or kernel.name in choice.kernels)
        and (not choice.archs or kernel.arch in choice.archs)
    ]
    if not chosen:
        raise click.UsageError(f"{folder} has none of these kernels; `build-kernels list` shows it")
    return one_per_role(chosen, choice.seed) if choice.quick else chosen


def _mutants(folder: Path, kernel: Kernel, choice: Choice) -> KernelMutants:
    artifact = load_artifact(folder, kernel.key)
    found = mutations_of(
        kernel.key,
        artifact.ptx,
        kernel.arch,
        facts_of(kernel),
        dynamic_shared_bytes=kernel.launch.dynamic_shared_bytes,
    )
    named = [m for m in found if not choice.only or any(part in m.name for part in choice.only)]
    size = choice.sample
    if size is None and choice.quick and not choice.only:
        size = QUICK_SAMPLE
    return KernelMutants(
        artifact=artifact, counts=counts(found), chosen=sample(named, size, choice.seed)
    )
