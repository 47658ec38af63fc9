"""A rung of the ladder of evidence, and the checker that its stored results are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from build_kernels.evidence.result import NOT_RUN, Result
from dsv4_router_runtime.artifacts.json_reader import JsonNode


class Reads(Enum):
    """The inputs that decide a rung's result."""

    FILES = "the cubin, its manifest entry and, if the set carries it, its PTX"
    SOURCES = "the kernel's sources and the PTX's hash"
    TEXT_AND_LAUNCH = "the PTX and the launch; the architecture of its .target line is irrelevant"
    RECORDS = "records of GPU tests; nothing is run here"


@dataclass(frozen=True, kw_only=True)
class Checker:
    """The version of a rung's judgement, and the distribution that it uses, if any.

    Raise a rung's number in the change that makes it judge otherwise: a fault that it let pass is
    found, a case or a schedule is added or replaced, another tolerance, an assumption dropped. Do
    not raise it for speed, wording, or a kernel that it refused before and now supports. If in
    doubt raise it: the price is one run of the rung (the emulated one takes the longest). A stored
    pass that the present rung would not give is false.

    A digest of the sources would require that run after every comment.
    """

    number: int
    tool: str = ""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One kind of check.

    climbs: the check, in one part or several side by side, each `(artifact, *, quick) -> Result`;
    quick requests fewer cases. join: makes the figures from those of the parts. checker: None if
    stored results never become stale, such as a GPU's. cost: rungs of the greatest cost start
    first. figures: the figures that `describe` reads, each with its check; all of them if the first
    is stored. required: the figure that every passed or failed result must have. packages: imported
    by the processes that climb.
    """

    name: str
    climbs: tuple[Callable[..., Result], ...]
    checker: Checker | None
    reads: Reads
    cost: int
    figures: Mapping[str, Callable[[JsonNode], object]]
    describe: Callable[[Mapping[str, Any]], Iterable[str]]
    required: str = ""
    packages: tuple[str, ...] = ()
    join: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] = lambda figures: figures[0]

    def present_checker(self) -> str:
        """Name the checker of this installation, such as "protocol 1, sentryward 0.1.1".

        The version of a tool that is not installed is left out.
        """
        if self.checker is None:
            return ""
        name, tool = f"{self.name} {self.checker.number}", self.checker.tool
        found = installed_version(tool) if tool else None
        return f"{name}, {tool} {found}" if found else name

    def is_present(self, stored: str) -> bool:
        """Compare a stored checker with the present one; a tool that is missing matches any."""
        if self.checker is None:
            return True
        number, _, tool = stored.partition(", ")
        present_number, _, present_tool = self.present_checker().partition(", ")
        return number == present_number and (not present_tool or tool == present_tool)

    def check_figures(self, node: JsonNode, result: Result) -> None:
        """Raise the node's error unless a stored result has the figures that `describe` reads."""
        stored = result.figures
        if self.required and result.status != NOT_RUN and not stored.get(self.required):
            raise node.error(f"{self.name} {result.status} without its {self.required}")
        for name, check in self.figures.items() if self._are_stored(stored) else ():
            check(node.member("figures").member(name))

    def details(self, figures: Mapping[str, Any]) -> list[str]:
        """Describe a result's figures, a few words each."""
        return list(self.describe(figures)) if self._are_stored(figures) else []

    def _are_stored(self, figures: Mapping[str, Any]) -> bool:
        return next(iter(self.figures)) in figures


def counted(number: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{number} {one if number == 1 else many}"


@lru_cache
def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
