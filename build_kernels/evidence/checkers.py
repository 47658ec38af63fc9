"""Who judged: what is stored with a result, so that it counts only while its judge is the present
one.

A checker is a number and a tool's version: "protocol 1, sentryward 0.1.1". Raise a rung's number in
the change that makes it judge otherwise: a fault that it let pass is found, a case or a schedule is
added or replaced, another tolerance, an assumption dropped. Not for speed, wording, or a kernel
that it refused before and now understands. When in doubt raise it: the price is one run of the rung
(the emulated one takes the longest), while a pass that today's rung would not give is a lie.

A digest of the sources would raise itself, and would ask for that run after every comment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, kw_only=True)
class Checker:
    """A rung's number, and the distribution that judges with it, if one does."""

    number: int
    tool: str = ""


# What a GPU did stays done, whoever reads the records: the hardware rung has no checker.
CHECKERS = {
    "structure": Checker(number=1, tool="nvidia-cuda-nvdisasm"),
    "lint": Checker(number=1, tool="nvidia-cutlass-dsl"),
    "protocol": Checker(number=1, tool="sentryward"),
    "emulated": Checker(number=4),
}


def present(rung: str) -> str:
    """The checker that would judge now; without the tool's version where it is not installed."""
    checker = CHECKERS.get(rung)
    if checker is None:
        return ""
    found = _version(checker.tool) if checker.tool else None
    name = f"{rung} {checker.number}"
    return f"{name}, {checker.tool} {found}" if found else name


def is_present(rung: str, stored: str) -> bool:
    """Was it the present checker? Where the tool is not installed, its version is not asked for."""
    if rung not in CHECKERS:
        return True
    number, _, tool = stored.partition(", ")
    present_number, _, present_tool = present(rung).partition(", ")
    return number == present_number and (not present_tool or tool == present_tool)


@lru_cache
def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
