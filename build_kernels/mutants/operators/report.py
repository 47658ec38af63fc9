"""Show the verdicts on the mutants by operators: a table, its score, and the survivors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .edits import OPERATORS
from .judge import EQUIVALENT, KILLED, SURVIVED, Verdict
from .mutation import Mutation
from .run import KernelMutants, score

_WORDS = (KILLED, SURVIVED, EQUIVALENT)


def judged(kernels: Sequence[KernelMutants]) -> Iterator[tuple[Mutation, Verdict]]:
    """Yield the mutants that have a verdict."""
    for each in kernels:
        for mutation in each.chosen:
            if mutation.place in each.verdicts:
                yield mutation, each.verdicts[mutation.place]


def survivors(kernels: Sequence[KernelMutants]) -> list[tuple[Mutation, Verdict]]:
    return [(m, verdict) for m, verdict in judged(kernels) if verdict.word == SURVIVED]


def table(kernels: Sequence[KernelMutants]) -> list[str]:
    """Return a line per kernel and per operator, and one per survivor."""
    all_judged = list(judged(kernels))
    rows: list[tuple[str, ...]] = [("", "mutants", "judged", *_WORDS)]
    for each in kernels:
        own = list(each.verdicts.values())
        rows.append(_row(each.artifact.kernel.key, sum(each.counts.values()), own))
    for operator in OPERATORS:
        total = sum(each.counts.get(operator, 0) for each in kernels)
        rows.append(_row(operator, total, [v for m, v in all_judged if m.operator == operator]))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    for mutation, verdict in survivors(kernels):
        lines += ["", f"survived: {mutation.name}: {verdict.reason}"]
        lines += [f"    {mutation.before}", f"    {mutation.after_words or '(nothing)'}"]
    return lines


def summary(kernels: Sequence[KernelMutants]) -> str:
    """Return the score in a sentence."""
    verdicts = [verdict for _, verdict in judged(kernels)]
    killed, faults = score(verdicts)
    share = f"{killed / faults:.3f}" if faults else "none judged"
    return (
        f"{killed} of {faults} mutants killed ({share}), "
        f"and {len(verdicts) - faults} equivalent ones left out"
    )


def document(kernels: Sequence[KernelMutants]) -> dict[str, Any]:
    """Return the verdicts for JSON."""
    verdicts = [verdict for _, verdict in judged(kernels)]
    killed, faults = score(verdicts)
    return {
        "killed": killed,
        "not_equivalent": faults,
        "kernels": {each.artifact.kernel.key: dict(each.counts) for each in kernels},
        "mutants": [
            {
                "mutant": mutation.name,
                "before": mutation.before,
                "after": mutation.after_words,
                "verdict": verdict.word,
                "scope": verdict.scope,
                "reason": verdict.reason,
            }
            for mutation, verdict in judged(kernels)
        ],
    }


def _row(name: str, total: int, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    numbers = [sum(verdict.word == word for verdict in verdicts) for word in _WORDS]
    return name, str(total), str(len(verdicts)), *map(str, numbers)
