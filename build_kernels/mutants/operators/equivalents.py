"""Changes that are no faults, by pattern: `equivalents.toml`."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .edits import OPERATORS
from .mutation import Mutation

_FILE = Path(__file__).with_name("equivalents.toml")


@dataclass(frozen=True, kw_only=True)
class Equivalent:
    """A class of harmless changes; see `equivalents.toml`."""

    reason: str
    kernel: str = ""
    operators: tuple[str, ...] = tuple(OPERATORS)
    change: str = ".*"
    around: str = ""
    unread: bool = False
    rounded: bool = False
    same_result: bool = False

    def matches(self, mutation: Mutation) -> bool:
        """Return whether the reason holds for a mutant."""
        return (
            re.match(self.kernel, mutation.artifact) is not None
            and mutation.operator in self.operators
            and (mutation.unread or not self.unread)
            and (mutation.rounded or not self.rounded)
            and (mutation.same_result or not self.same_result)
            and re.search(self.around, mutation.around) is not None
            and re.fullmatch(self.change, f"{mutation.before} -> {mutation.after_words}")
            is not None
        )


@cache
def equivalents() -> tuple[Equivalent, ...]:
    """Read the file."""
    entries = tomllib.loads(_FILE.read_text())["equivalent"]
    return tuple(
        Equivalent(**{**entry, "operators": tuple(entry.get("operators", OPERATORS))})
        for entry in entries
    )


def why_equivalent(mutation: Mutation) -> str | None:
    """Return the reason why a mutant does no harm, None if no entry matches."""
    return next((each.reason for each in equivalents() if each.matches(mutation)), None)
