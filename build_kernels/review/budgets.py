"""Read and write budgets.toml, and hold what was measured to it.

A budget is a number at a path, such as ("kernels", "router_topk.sm_90a", "registers"). What was
measured has the same paths, so that both are compared, written and listed without cases.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_kernels.errors import BuilderError
from build_kernels.files import replace_file
from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES, read_file, reason_of
from dsv4_router_runtime.errors import printable

EVERY_KERNEL, KERNELS, PACKAGE, GPU = SECTIONS = ("every_kernel", "kernels", "package", "gpu")
# Local memory is slow, and no kernel here needs it: `--update` writes no other number.
NO_LOCAL_MEMORY = {"spill_bytes": 0, "stack_bytes": 0, "local_instructions": 0}
# How far a budget may lie above what was measured before `--update` lowers it, and the headroom of
# a new one. Bytes differ by the compressor, times by the machine and by what else it does.
_HEADROOM = {
    "wheel_bytes": (1.05, 1.1),
    "import_ms": (3.0, 9.0),
    "load_ms": (3.0, 9.0),
}
_HEADER = """\
# What each kernel and the package may use, and what the GPUs took: `build-kernels budget`.
# Counts of opcodes (capitals) are exact, all other numbers are the most that is allowed.
# Written by `build-kernels budget --update`, but for [every_kernel].
"""
_ADVICE = "restore it with git, or delete it and run `build-kernels budget --update`"
# [kernels.NAME] ARCH = {registers = 64}; [gpu."NAME"] "SHAPE MODE" = {8 = 3.6}; others are flat.
_DEPTH = {EVERY_KERNEL: 2, PACKAGE: 2, KERNELS: 4, GPU: 4}
_BARE = re.compile(r"[A-Za-z0-9_-]+")

Place = tuple[str, ...]
Numbers = Mapping[Place, float]


class BudgetError(BuilderError):
    """The file of budgets cannot be read; the message names it and the place in it."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number that was measured. low: below its noise, if it has any; else the number itself."""

    value: float
    low: float | None = None


@dataclass(frozen=True, kw_only=True)
class Excess:
    """A budget that is not held: of what, what was measured, what is allowed."""

    what: str
    got: str
    allowed: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """A budget that another file of budgets has otherwise, or not at all: "none"."""

    what: str
    before: str
    now: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a set stands to its budgets; names of budgets are as `shown` returns them.

    loose: those of kernels above what was measured. not_measured: those without a measurement.
    no_budget: times and sizes without a budget, which fail nothing; a kernel without one does.
    changed: what differs from another file of budgets, if one was given.
    """

    held: int
    exceeded: tuple[Excess, ...]
    loose: tuple[str, ...]
    not_measured: tuple[str, ...]
    no_budget: tuple[str, ...]
    notes: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()


def changes(before: Numbers, now: Numbers) -> tuple[Change, ...]:
    """Return the budgets that differ, in the order of the file."""

    def at(numbers: Numbers, place: Place) -> str:
        return _number(numbers[place]) if place in numbers else "none"

    return tuple(
        Change(what=shown(place), before=at(before, place), now=at(now, place))
        for place in sorted(before.keys() | now.keys(), key=_order)
        if before.get(place) != now.get(place)
    )


def read_budgets(path: Path) -> dict[Place, float]:
    """Return the file's budgets; BudgetError unless it is a file of this shape."""
    try:
        document = tomllib.loads(read_file(path, most_bytes=MAX_JSON_BYTES).decode())
    except OSError as error:
        raise BudgetError(f"{path}: cannot be read ({reason_of(error)}); {_ADVICE}") from error
    except (ValueError, RecursionError) as error:
        problem = printable(str(error), 200)
        raise BudgetError(f"{path}: not valid TOML ({problem}); {_ADVICE}") from error
    if unknown := sorted(document.keys() - set(SECTIONS)):
        raise BudgetError(
            f"{path}: unknown table {printable(unknown[0])} (allowed: {', '.join(SECTIONS)}); "
            f"{_ADVICE}"
        )
    budgets = {}
    for place, value in _flat(document, ()):
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 <= value < math.inf or len(place) != _DEPTH[place[0]]:
            raise BudgetError(
                f"{path}: {printable('.'.join(place), 200)}: expected a number >= 0 "
                f"(got {printable(str(value), 80)}); {_ADVICE}"
            )
        budgets[place] = value
    return budgets


def _flat(value: Any, path: Place) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict) and len(path) < 4 and (value or not path):
        for key, member in value.items():
            yield from _flat(member, (*path, key))
    else:
        yield path, value


def judge(measured: Mapping[Place, Measured], budgets: Numbers) -> Verdict:
    """Hold what was measured to the budgets. A number of a kernel that is not stated is 0."""
    kernels, budgeted = _kernels(measured), _kernels(budgets)
    exceeded = [
        *(Excess(what=shown(k), got="built", allowed="no budget") for k in kernels - budgeted),
        *(Excess(what=shown(k), got="not built", allowed="a budget") for k in budgeted - kernels),
    ]
    limits = {place: limit for place, limit in budgets.items() if place[0] in (PACKAGE, GPU)}
    found = {place: value for place, value in measured.items() if place[0] != KERNELS}
    of_all = {place[1:]: limit for place, limit in budgets.items() if place[0] == EVERY_KERNEL}
    for kernel in kernels & budgeted:
        numbers = {place[3:] for place in (*measured, *budgets) if place[:3] == kernel}
        for name in numbers | of_all.keys():
            place = (*kernel, *name)
            limits[place] = budgets.get(place, of_all.get(name, 0))
            found[place] = measured.get(place, Measured(value=0))
    both = sorted(found.keys() & limits.keys(), key=_order)
    over = [place for place in both if _exceeds(place, found[place], limits[place])]
    exceeded += (
        Excess(
            what=shown(place),
            got=_number(found[place].value),
            allowed=f"{'exactly ' if _is_exact(place) else ''}{_number(limits[place])}",
        )
        for place in over
    )
    higher = (p for p in both if p[0] == KERNELS and limits[p] > found[p].value and p not in over)
    return Verdict(
        held=len(both) - len(over),
        exceeded=tuple(sorted(exceeded, key=lambda row: row.what)),
        loose=tuple(map(shown, higher)),
        not_measured=tuple(map(shown, sorted(limits.keys() - found.keys(), key=_order))),
        no_budget=tuple(map(shown, sorted(found.keys() - limits.keys(), key=_order))),
    )


def _kernels(numbers: Iterable[Place]) -> set[Place]:
    return {place[:3] for place in numbers if place[0] == KERNELS}


def _is_exact(place: Place) -> bool:
    return place[0] == KERNELS and place[3].isupper()


def _exceeds(place: Place, got: Measured, limit: float) -> bool:
    if _is_exact(place):
        return got.value != limit
    return (got.value if got.low is None else got.low) > limit


def renewed(
    measured: Mapping[Place, Measured], old: Numbers, known: Collection[Place]
) -> dict[Place, float]:
    """Return the budgets that `measured` holds. What was not measured keeps its old one.

    known: every kernel that can be built; budgets of others are dropped.
    """
    kept = set(known) - _kernels(measured)
    new: dict[Place, float] = {(EVERY_KERNEL, n): limit for n, limit in NO_LOCAL_MEMORY.items()}
    new |= {p: limit for p, limit in old.items() if p[0] != KERNELS or p[:3] in kept}
    for place, got in measured.items():
        if place[0] == KERNELS:
            if (EVERY_KERNEL, *place[3:]) not in new and got.value:
                new[place] = got.value
        elif place[-1] in _HEADROOM:
            factor, most = _HEADROOM[place[-1]]
            if not got.value <= new.get(place, -1) <= most * got.value:
                new[place] = _round_up(factor * got.value)
        else:
            new[place] = got.value
    return new


def _round_up(value: float) -> int:
    """Round up to three digits."""
    step = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 2)
    return math.ceil(value / step) * step


def write_budgets(path: Path, budgets: Numbers) -> None:
    """Write the file in one step, sorted: equal budgets give equal bytes."""
    tables: dict[Place, list[str]] = {}
    inline: dict[Place, list[str]] = {}
    for place in sorted(budgets, key=_order):
        pair = f"{_key(place[-1])} = {_number(budgets[place])}"
        if len(place) == 2:
            tables.setdefault(place[:1], []).append(pair)
        else:
            tables.setdefault(place[:2], [])
            inline.setdefault(place[:3], []).append(pair)
    for place, pairs in inline.items():
        tables[place[:2]].append(f"{_key(place[2])} = {{ {', '.join(pairs)} }}")
    lines = [_HEADER]
    for table, rows in tables.items():
        lines += [f"[{'.'.join(map(_key, table))}]", *rows, ""]
    replace_file(path, "\n".join(lines).encode())


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name)


def _order(place: Place) -> tuple[tuple[int, int, str], ...]:
    """Sort by section, then by name, numbers by value."""
    rest = ((1, int(part), "") if part.isdecimal() else (2, 0, part) for part in place[1:])
    return ((0, SECTIONS.index(place[0]), ""), *rest)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def shown(place: Place) -> str:
    """Return a path as a reader calls it: `router_topk.sm_90a registers`."""
    section, *names = place
    if section == KERNELS:
        return ".".join(names[:2]) + "".join(f" {name}" for name in names[2:])
    if section == GPU:
        return f"{names[0]}, {names[1]}, N = {names[2]}, microseconds"
    return " ".join(names)
