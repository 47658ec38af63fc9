"""Write a comparison as text, Markdown or JSON; kernels with equal changes share a paragraph."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from dsv4_router_runtime.errors import printable

from .difference import (
    ABI,
    ADDED,
    CHANGED,
    EVIDENCE,
    KERNELS,
    LAUNCH,
    OPCODES,
    PROBLEM,
    REMOVED,
    RESOURCES,
    SAME,
    SAME_SASS,
    UNKNOWN_SASS,
    Change,
    Comparison,
    KernelChange,
)

_MAX_VALUE = 120
_ARROW = "→"
_COLUMNS = (ABI, LAUNCH, PROBLEM, RESOURCES, OPCODES, EVIDENCE)
_MARKDOWN = {ord(char): f"&#{ord(char)};" for char in "|<>&*`[]@#\\"}
_OTHERS = "other"


def to_json(comparison: Comparison) -> str:
    """Return the comparison as JSON, with `is_same` and the number of changes of each class."""
    document = {
        **asdict(comparison),
        "is_same": comparison.is_same,
        "classes": comparison.classes(),
    }
    return json.dumps(document, indent=1, sort_keys=True)


def to_text(comparison: Comparison) -> str:
    """Return the comparison for a terminal."""
    lines = [f"before: {comparison.before}", f"after:  {comparison.after}", _counts(comparison)]
    if classes := comparison.classes():
        lines.append("changes: " + ", ".join(f"{kind} {n}" for kind, n in classes.items()))
    lines += (f"{change.kind}: {_sentence(change)}" for change in comparison.set_changes)
    for keys, sample in _groups(comparison.kernels):
        lines.append(f"{_listed(keys)}: {sample.cubin}")
        lines += (f"  {change.kind}: {_sentence(change)}" for change in sample.changes)
    lines += (f"note: {note}" for note in comparison.notes)
    return "\n".join(lines)


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as a reviewer reads it: a row for kernels with the same changes."""
    sides = markdown_safe(f"{comparison.before} {_ARROW} {comparison.after}")
    lines = [
        "## What this change does to every kernel",
        "",
        f"{sides}: {_counts(comparison)}.",
    ]
    set_changes = [f"- {c.kind}: {markdown_safe(_sentence(c))}" for c in comparison.set_changes]
    lines += ["", *set_changes] if set_changes else []
    if groups := list(_groups(comparison.kernels)):
        used = {change.kind for _, sample in groups for change in sample.changes}
        columns = [kind for kind in _COLUMNS if kind in used]
        columns += [_OTHERS] if used - {*_COLUMNS, KERNELS} else []
        lines += ["", f"| kernel | cubin | {' | '.join(columns)} |"]
        lines.append("|" + " --- |" * (len(columns) + 2))
        lines += (_row(keys, sample, columns) for keys, sample in groups)
    untouched = [item.key for item in comparison.kernels if _is_untouched(item)]
    if untouched and groups:
        lines += ["", f"Unchanged: {markdown_safe(_listed(untouched))}."]
    if comparison.notes:
        lines += ["", *(f"- note: {markdown_safe(note)}" for note in comparison.notes)]
    return "\n".join(lines)


def _counts(comparison: Comparison) -> str:
    counts = [
        f"{number} {state}"
        for state in (SAME, SAME_SASS, CHANGED, UNKNOWN_SASS, ADDED, REMOVED)
        if (number := sum(item.cubin == state for item in comparison.kernels))
    ]
    total = len(comparison.kernels)
    text = f"{total} cubin{'s' * (total != 1)}: {', '.join(counts) or 'none'}"
    return f"{text}; no difference" if comparison.is_same else text


def _is_untouched(kernel: KernelChange) -> bool:
    return kernel.cubin == SAME and not kernel.changes


def _groups(kernels: Sequence[KernelChange]) -> Iterator[tuple[list[str], KernelChange]]:
    """Yield the keys of kernels with equal changes, and one of them, in the order of the first."""
    groups: dict[str, tuple[list[str], KernelChange]] = {}
    for kernel in kernels:
        if not _is_untouched(kernel):
            same = json.dumps(asdict(kernel) | {"key": ""}, sort_keys=True)
            groups.setdefault(same, ([], kernel))[0].append(kernel.key)
    yield from groups.values()


def _row(keys: Sequence[str], sample: KernelChange, columns: Sequence[str]) -> str:
    cells = [markdown_safe(_listed(keys)), sample.cubin]
    for column in columns:
        told = [
            markdown_safe(_sentence(change))
            for change in sample.changes
            if change.kind == column
            or (column == _OTHERS and change.kind not in (*_COLUMNS, KERNELS))
        ]
        cells.append("<br>".join(told) or "=")
    return f"| {' | '.join(cells)} |"


def _listed(keys: Sequence[str]) -> str:
    """Return the keys with each kernel's name once: `router_topk (sm_90a, sm_100a)`."""
    archs: dict[str, list[str]] = {}
    for key in keys:
        name, _, arch = key.rpartition(".")
        archs.setdefault(name, []).append(arch)
    return ", ".join(f"{name} ({', '.join(found)})" for name, found in archs.items())


def _sentence(change: Change) -> str:
    """Return a change in one line: `registers 64 → 65 (+1)`."""
    words = [change.what]
    if change.before is not None or change.after is not None:
        words += [_value(change.before), _ARROW, _value(change.after)]
    if _is_number(change.before) and _is_number(change.after):
        words.append(f"({change.after - change.before:+d})")
    return printable(" ".join(word for word in (*words, change.word) if word))


def _value(value: object) -> str:
    """Return a JSON value in short; None stands for what is not there."""
    if value is None:
        return "none"
    if isinstance(value, dict) and all(map(_is_number, value.values())):
        return ", ".join(f"{name} {number}" for name, number in value.items() if number)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return printable(text, _MAX_VALUE)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def markdown_safe(text: str) -> str:
    """Return text that Markdown shows as it is: names here may come out of anybody's wheel."""
    return printable(text).translate(_MARKDOWN)
