"""Compare two sets: name each change, and say of which class it is. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from build_kernels.binaries.nvdisasm import LOCAL_OPCODES
from dsv4_router_runtime.artifacts.evidence import FAILED, NOT_RUN, PASSED

from .code import same_code
from .side import Json, Side, Standing

# The classes of a change, in the order in which a reviewer wants them.
ABI = "abi"  # what the launch passes: a change of its own
LAUNCH = "launch"
PROBLEM = "problem range"
RESOURCES = "resources"
OPCODES = "opcodes"
EVIDENCE = "evidence"
DRIVER, TOOLCHAIN, SCHEMA = "driver", "toolchain", "schema"
CODE = "code"  # bytes, of which the manifest records the hash alone
SOURCES = "sources"
OTHER = "other"
KERNELS = "kernels"  # added or removed
CLASSES = (
    *(KERNELS, ABI, LAUNCH, PROBLEM, RESOURCES, OPCODES, EVIDENCE),
    *(DRIVER, TOOLCHAIN, SCHEMA, CODE, SOURCES, OTHER),
)

SAME, SAME_SASS, CHANGED = "same bytes", "same SASS", "changed"
UNKNOWN_SASS = "changed (SASS not compared)"
ADDED, REMOVED = "added", "removed"

_RESOURCE_NAMES = {
    "registers": "registers",
    "spill_bytes": "bytes of spills",
    "stack_bytes": "bytes of stack",
    "static_shared_bytes": "bytes of static shared memory",
}
_DYNAMIC = "bytes of dynamic shared memory"
_RANK = {FAILED: 0, NOT_RUN: 1, "does not apply": 1, "passed (quick)": 2, PASSED: 3}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change. `kind` is its class; `word` what it means, such as "narrowed", if known."""

    kind: str
    what: str
    before: Json = None
    after: Json = None
    word: str = ""


@dataclass(frozen=True, kw_only=True)
class KernelChange:
    """What became of one kernel for one architecture. cubin: SAME, ADDED, ...; see above."""

    key: str
    cubin: str
    changes: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every kernel of both sides, the changes of the whole set, and what was not compared."""

    before: str
    after: str
    set_changes: tuple[Change, ...]
    kernels: tuple[KernelChange, ...]
    notes: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        return not self.set_changes and not any(
            kernel.changes or kernel.cubin != SAME for kernel in self.kernels
        )

    def classes(self) -> dict[str, int]:
        """Return the number of changes of each class that occurs, the set's and the kernels'."""
        found = [change.kind for change in self.set_changes]
        for kernel in self.kernels:
            found += [change.kind for change in kernel.changes]
        return {kind: found.count(kind) for kind in CLASSES if kind in found}


# Counts every opcode of a cubin, modifiers kept.
Disassembler = Callable[[bytes], Mapping[str, int]]


def compare(a: Side, b: Side, disassemble: Disassembler | None = None) -> Comparison:
    """Compare two sides, `a` before and `b` after; with `disassemble`, every opcode of new code."""
    kernels = tuple(
        _kernel(key, a, b, disassemble) for key in sorted(a.kernels.keys() | b.kernels.keys())
    )
    notes = [*a.notes, *(note for note in b.notes if note not in a.notes)]
    if any(kernel.cubin == UNKNOWN_SASS for kernel in kernels):
        notes.append("not compared, as the cubins of both sides are not at hand: SASS, cubin bytes")
    return Comparison(
        before=a.name,
        after=b.name,
        set_changes=tuple(_set_changes(a.members, b.members)),
        kernels=kernels,
        notes=tuple(notes),
    )


def _set_changes(a: Mapping[str, Json], b: Mapping[str, Json]) -> Iterator[Change]:
    kinds = {"schema_version": SCHEMA, "toolchain": TOOLCHAIN, "driver": DRIVER}
    for name in sorted(a.keys() | b.keys()):
        kind = kinds.get(name, OTHER)
        for what, before, after in _leaves(a.get(name), b.get(name)):
            word = ""
            if kind == DRIVER and _are_ints(before, after):
                word = "raised" if after > before else "lowered"
            yield Change(kind=kind, what=what or name, before=before, after=after, word=word)


def _kernel(key: str, a: Side, b: Side, disassemble: Disassembler | None) -> KernelChange:
    before, after = a.kernels.get(key), b.kernels.get(key)
    changes: list[Change] = []
    if before is None or after is None:
        cubin = ADDED if before is None else REMOVED
        changes = [Change(kind=KERNELS, what=cubin), *_whole(before, after)]
    else:
        cubin, changes = _cubin(key, a, b, disassemble)
        changes += _abi(before, after)
        changes += _launch(before["launch"], after["launch"])
        changes += _problem(before, after)
        changes += _resources(before["resources"], after["resources"])
        changes += _rest(before, after)
    changes += _evidence(a.evidence.get(key, {}), b.evidence.get(key, {}))
    changes.sort(key=lambda change: CLASSES.index(change.kind))
    return KernelChange(key=key, cubin=cubin, changes=tuple(changes))


def _cubin(
    key: str, a: Side, b: Side, disassemble: Disassembler | None
) -> tuple[str, list[Change]]:
    """Compare code: the bytes by hash, the SASS if both cubins are at hand."""
    before, after = a.kernels[key], b.kernels[key]
    changes = []
    if before["ptx_sha256"] != after["ptx_sha256"]:
        changes.append(Change(kind=CODE, what="PTX", word="changed"))
    if before["cubin_sha256"] == after["cubin_sha256"]:
        return SAME, changes
    old, new = a.cubin(key), b.cubin(key)
    if old is None or new is None:
        return UNKNOWN_SASS, changes
    if len(old) != len(new):
        size = Change(kind=RESOURCES, what="bytes of cubin", before=len(old), after=len(new))
        changes.append(size)
    if same_code(old, new):
        return SAME_SASS, changes
    if disassemble is not None:
        changes += _counts(disassemble(old), disassemble(new), "SASS ")
    return CHANGED, changes


def _abi(before: Mapping[str, Json], after: Mapping[str, Json]) -> Iterator[Change]:
    """Compare symbol, role and parameters: what a launch passes, where, and of which type."""
    for name in ("role", "symbol"):
        if before.get(name) != after.get(name):
            yield Change(kind=ABI, what=name, before=before.get(name), after=after.get(name))
    old, new = before["parameters"], after["parameters"]
    renamed = _renamed(old, new)
    for now, was in renamed.items():
        yield Change(kind=ABI, what="parameter", before=was, after=now, word="renamed")
    named = [renamed.get(item["name"], item["name"]) for item in new]
    old_by, new_by = {item["name"]: item for item in old}, dict(zip(named, new, strict=True))
    for index, item in enumerate(old):
        if item["name"] not in new_by:
            yield Change(kind=ABI, what=f"parameter {item['name']}", before=index, word="removed")
    for index, name in enumerate(named):
        if name not in old_by:
            yield Change(kind=ABI, what=f"parameter {name}", after=index, word="added")
    shared = [name for name in named if name in old_by]
    yield from _moved([name for name in old_by if name in new_by], shared)
    yield from _offsets([(name, old_by[name], new_by[name]) for name in shared])
    for name in shared:
        yield from _parameter(name, old_by[name], new_by[name])


def _renamed(old: Sequence[Json], new: Sequence[Json]) -> dict[str, str]:
    """Map new names to old ones: the same place, kind and type, and neither on the other side."""
    before, after = ({item["name"] for item in side} for side in (old, new))
    return {
        now["name"]: was["name"]
        for was, now in zip(old, new, strict=False)
        if was["name"] not in after
        and now["name"] not in before
        and all(was.get(part) == now.get(part) for part in ("offset", "kind", "element_type"))
    }


def _moved(old: Sequence[str], new: Sequence[str]) -> Iterator[Change]:
    """Name the fewest parameters that explain another order of those on both sides."""
    place = {name: index for index, name in enumerate(old)}
    # A longest increasing subsequence stays: `chains` holds the longest that ends with each name.
    chains: list[tuple[str, ...]] = [()]
    for name in new:
        fitting = (chain for chain in chains if not chain or place[chain[-1]] < place[name])
        chains.append((*max(fitting, key=len), name))
    kept = max(chains, key=len)
    for index, name in enumerate(new):
        if name not in kept:
            what = f"parameter {name}, place"
            yield Change(kind=ABI, what=what, before=place[name], after=index, word="moved")


def _offsets(shared: Sequence[tuple[str, Json, Json]]) -> Iterator[Change]:
    """Name the parameters at other offsets; a run of them that moved by the same, at once."""
    ends = [(old.get("offset"), new.get("offset")) for _, old, new in shared]
    by = [now - was if _are_ints(was, now) else (was, now) for was, now in ends]
    for _, group in groupby(zip(by, shared, strict=True), key=lambda pair: str(pair[0])):
        parameters = [parameter for _, parameter in group]
        (first, old, new), (last, _, _) = parameters[0], parameters[-1]
        if old.get("offset") != new.get("offset"):
            to = f" to {last} ({len(parameters)})" if parameters[1:] else ""
            what = f"parameter {first}{to}, offset"
            yield Change(kind=ABI, what=what, before=old.get("offset"), after=new.get("offset"))


def _parameter(name: str, old: Mapping[str, Json], new: Mapping[str, Json]) -> Iterator[Change]:
    for part in sorted((old.keys() | new.keys()) - {"name", "offset"}):
        for leaf, was, now in _leaves(old.get(part), new.get(part)):
            # How a map is encoded and what scratch is kept are launches' matter, a type is not.
            typed = part not in ("tensor_map", "scratch") or leaf in ("tensor", "element_type")
            what = f"parameter {name}, {part}{f'.{leaf}' if leaf else ''}"
            yield Change(kind=ABI if typed else LAUNCH, what=what, before=was, after=now)


def _launch(before: Mapping[str, Json], after: Mapping[str, Json]) -> Iterator[Change]:
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was == now:
            continue
        if name == "dynamic_shared_bytes":
            yield Change(kind=RESOURCES, what=_DYNAMIC, before=was, after=now)
        elif name == "max_clusters":  # it bounds the tokens of a launch
            word = _range_word([1, was], [1, now])
            yield Change(kind=PROBLEM, what="clusters per launch", before=was, after=now, word=word)
        else:
            yield Change(kind=LAUNCH, what=name, before=was, after=now)


def _problem(before: Mapping[str, Json], after: Mapping[str, Json]) -> Iterator[Change]:
    old, new = before["problem"], after["problem"]
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if name == "dtypes" and isinstance(was, dict) and isinstance(now, dict):
            for tensor in sorted(was.keys() | now.keys()):
                types = was.get(tensor), now.get(tensor)
                if types[0] != types[1]:
                    what, word = f"dtypes of {tensor}", _set_word(*types)
                    yield Change(
                        kind=PROBLEM, what=what, before=types[0], after=types[1], word=word
                    )
        elif was != now:
            word = _multiple_word(was, now) if name == "k_multiple" else _range_word(was, now)
            yield Change(kind=PROBLEM, what=name, before=was, after=now, word=word)


def _range_word(before: Json, after: Json) -> str:
    """Say whether a range [low, high], None for no end, became a part of it or holds it."""
    ends = []
    for value in (before, after):
        if not isinstance(value, list) or len(value) != 2 or not _are_ints(value[0]):
            return ""
        if not (value[1] is None or _are_ints(value[1])):
            return ""
        ends.append((value[0], float("inf") if value[1] is None else value[1]))
    (low, high), (new_low, new_high) = ends
    if low <= new_low and new_high <= high:
        return "narrowed"
    return "widened" if new_low <= low and high <= new_high else "moved"


def _set_word(before: Json, after: Json) -> str:
    if before is None or after is None:
        return "gained" if before is None else "lost"
    if not all(isinstance(each, list) for each in (before, after)):
        return ""
    old, new = ({str(item) for item in each} for each in (before, after))
    if new < old:
        return "narrowed"
    return "widened" if old < new else ""


def _multiple_word(before: Json, after: Json) -> str:
    if not _are_ints(before, after) or before < 1 or after < 1:
        return ""
    if after % before == 0:
        return "narrowed"
    return "widened" if before % after == 0 else ""


def _resources(old: Mapping[str, Json], new: Mapping[str, Json]) -> Iterator[Change]:
    for name in sorted(old.keys() | new.keys()):
        if name != "opcodes" and old.get(name) != new.get(name):
            what = _RESOURCE_NAMES.get(name, name)
            yield Change(kind=RESOURCES, what=what, before=old.get(name), after=new.get(name))
    yield from _counts(old.get("opcodes"), new.get("opcodes"))


def _counts(old: Json, new: Json, prefix: str = "") -> Iterator[Change]:
    for opcode, was, now in _leaves(old, new):
        # An opcode that a manifest leaves out occurs nowhere.
        ends = was or 0, now or 0
        if ends[0] != ends[1]:
            local = opcode in LOCAL_OPCODES
            yield Change(
                kind=RESOURCES if local else OPCODES,
                what=f"local memory instructions {opcode}" if local else f"{prefix}{opcode}",
                before=ends[0],
                after=ends[1],
                word="" if ends[1] else "lost",
            )


def _whole(before: Mapping[str, Json] | None, after: Mapping[str, Json] | None) -> Iterator[Change]:
    """Describe a kernel of one side: its resources and opcode counts, without those that are 0."""
    resources, opcodes = [], []
    for entry in (before, after):
        found = dict(entry["resources"]) if entry else {}
        counts = found.pop("opcodes", None)
        found |= {_DYNAMIC: entry["launch"].get("dynamic_shared_bytes")} if entry else {}
        resources.append({_RESOURCE_NAMES.get(name, name): found[name] for name in found} or None)
        opcodes.append(counts or None)
    yield Change(kind=RESOURCES, what="", before=resources[0], after=resources[1])
    yield Change(kind=OPCODES, what="", before=opcodes[0], after=opcodes[1])


def _evidence(before: Mapping[str, Standing], after: Mapping[str, Standing]) -> Iterator[Change]:
    """Compare what the evidence shows, and where it was run; not its figures."""
    none = Standing(status=NOT_RUN)
    for rung in sorted(before.keys() | after.keys()):
        was, now = before.get(rung, none), after.get(rung, none)
        rise = _RANK[now.status] - _RANK[was.status]
        if rise:  # "not run" and "does not apply" show the same
            word = "failed" if now.status == FAILED else "gained" if rise > 0 else "lost"
            yield Change(kind=EVIDENCE, what=rung, before=was.status, after=now.status, word=word)
        elif was.checker != now.checker and was.status == now.status != NOT_RUN:
            yield Change(
                kind=EVIDENCE, what=f"{rung}, checker", before=was.checker, after=now.checker
            )
        for gpus, word in (
            (set(was.gpus) - set(now.gpus), "lost"),
            (set(now.gpus) - set(was.gpus), "gained"),
        ):
            for gpu in sorted(gpus):
                yield Change(kind=EVIDENCE, what=f"{rung} on {gpu}", word=word)


def _rest(before: Mapping[str, Json], after: Mapping[str, Json]) -> Iterator[Change]:
    """Compare every member that no other function here compares, also one of another schema."""
    if before.get("source_digest") != after.get("source_digest"):
        yield Change(kind=SOURCES, what="source digest", word="changed")
    compared = {
        *("name", "arch", "role", "symbol", "parameters", "launch", "problem", "resources"),
        *("cubin_sha256", "ptx_sha256", "source_digest"),
    }
    for name in sorted((before.keys() | after.keys()) - compared):
        for leaf, was, now in _leaves(before.get(name), after.get(name)):
            what = f"{name}.{leaf}" if leaf else name
            yield Change(kind=OTHER, what=what, before=was, after=now)


def _leaves(before: Json, after: Json, path: str = "") -> Iterator[tuple[str, Json, Json]]:
    """Yield (path, before, after) of the members that differ; None for one that is not there."""
    objects = [value for value in (before, after) if isinstance(value, dict)]
    if objects and all(isinstance(value, dict) or value is None for value in (before, after)):
        old, new = before or {}, after or {}
        for name in sorted(old.keys() | new.keys()):
            inner = f"{path}.{name}" if path else name
            yield from _leaves(old.get(name), new.get(name), inner)
    elif before != after:
        yield path, before, after


def _are_ints(*values: Any) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)
