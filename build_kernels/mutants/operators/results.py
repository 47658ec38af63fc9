"""Keep verdicts in a file of JSON lines, by the kernel's PTX, the checker and the mutant.

A line is appended when its verdict is found, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from build_kernels.evidence.document import EvidenceError
from build_kernels.evidence.result import FULL
from build_kernels.evidence.rungs import emulated

from .judge import KILLED, Verdict
from .mutation import Mutation

_MEMBERS = {"ptx_sha256", "checker", "mutant", "after", "word", "scope", "reason"}


class ResultsError(EvidenceError):
    """A file of verdicts that cannot be read; the message names the line."""


class Results:
    """The verdicts of one file that the present checker found; the others stay in the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checker = emulated.RUNG.present_checker()
        self._verdicts: dict[tuple[str, str, str], Verdict] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            entry = self._parse(number, line)
            if entry["checker"] == self._checker:
                verdict = Verdict(**{name: entry[name] for name in ("word", "scope", "reason")})
                self._verdicts[entry["ptx_sha256"], entry["mutant"], entry["after"]] = verdict

    def of(self, ptx_sha256: str, mutation: Mutation, scope: str) -> Verdict | None:
        """Return the stored verdict unless `scope` would show more."""
        found = self._verdicts.get(_key(ptx_sha256, mutation))
        if found is None or (found.word != KILLED and scope == FULL != found.scope):
            return None
        return found

    def add(self, ptx_sha256: str, mutation: Mutation, verdict: Verdict) -> None:
        """Append a verdict to the file."""
        _, place, after = key = _key(ptx_sha256, mutation)
        self._verdicts[key] = verdict
        members: Mapping[str, Any] = {
            "ptx_sha256": ptx_sha256,
            "checker": self._checker,
            "mutant": place,
            "after": after,
            **asdict(verdict),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(members) + "\n")

    def _parse(self, number: int, line: str) -> Mapping[str, str]:
        try:
            entry = json.loads(line)
            if isinstance(entry, dict) and _MEMBERS == {k for k in entry if entry[k] is not None}:
                return entry
        except ValueError:
            pass
        raise ResultsError(
            f"{self._path}: line {number}: expected an object with {sorted(_MEMBERS)} "
            f"(got {line[:80]!r}); delete the line, and its mutant is judged again"
        )


def _key(ptx_sha256: str, mutation: Mutation) -> tuple[str, str, str]:
    return ptx_sha256, mutation.place, mutation.after_words
