"""Mutants: one fault each, as edits of a built kernel's PTX or changes of its tensor maps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from build_kernels.evidence.cases import Case

# Enough for a fault that the happens-before checks find, or that changes the result.
SCHEDULES = (("latest", 0), ("earliest", 0), ("random", 1), ("random", 2))


class MutantError(Exception):
    """The mutant's pattern is no longer in the kernel: rewrite the mutant."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of the text at every match of `pattern`, or at match `nth` (from 0)."""

    pattern: str
    replacement: str | Callable[[re.Match], str]
    nth: int | None = None

    def __call__(self, ptx: str) -> str:
        """Return the text with the change."""
        matches = list(re.finditer(self.pattern, ptx))
        chosen = matches if self.nth is None else matches[self.nth : self.nth + 1]
        if not chosen:
            raise MutantError(f"match {self.nth} of {self.pattern!r} is not in the PTX")
        pieces, end = [], 0
        for match in chosen:
            new = self.replacement
            pieces += [ptx[end : match.start()], new(match) if callable(new) else match.expand(new)]
            end = match.end()
        return "".join(pieces) + ptx[end:]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault, or a change that does no harm.

    kind: its class. edits: changes of the PTX. maps: fields of tensor maps to change, by parameter.
    case: the inputs of its runs, under `schedules`. rejected_by: the rungs that must reject it, as
    measured; any other rung accepts it or cannot run it. complaint: text that the emulated rung's
    complaint must contain, if another complaint would be about something else. harmless: the
    proof, for a mutant that every rung rightly accepts.
    """

    name: str
    kind: str
    artifact: str
    rejected_by: tuple[str, ...]
    edits: tuple[Edit, ...] = ()
    maps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    case: Case
    schedules: tuple[tuple[str, int], ...] = SCHEDULES
    complaint: str = ""
    harmless: str = ""


def mutated(mutant: Mutant, ptx: str) -> str:
    """Return the kernel's text with the fault; MutantError if a pattern is no longer in it."""
    for edit in mutant.edits:
        try:
            ptx = edit(ptx)
        except MutantError as error:
            raise MutantError(f"{mutant.name}: {error}") from None
    return ptx
