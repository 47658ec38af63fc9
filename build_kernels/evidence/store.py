"""What was shown about an artifact's bytes, by which rung, and the file that keeps it.

Reads and writes JSON, runs nothing. Evidence belongs to a pair of hashes, the cubin's and its
PTX's, and is looked up by them: when the bytes change it is stale, and so is what another checker
than the present one found (see `checkers`); stale evidence counts as none. Whatever was not run
says "not run" and why.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES, read_file, reason_of
from dsv4_router_runtime.artifacts.json_reader import JsonNode, read_json
from dsv4_router_runtime.artifacts.kernel import Kernel
from dsv4_router_runtime.errors import (
    MAX_FILE_SHOWN,
    MAX_PROBLEM_SHOWN,
    ManifestError,
    printable,
)

from .checkers import is_present

SCHEMA_VERSION = 1

# In the order they are climbed.
RUNGS = ("structure", "lint", "protocol", "emulated", "hardware")

PASSED = "passed"
FAILED = "failed"
NOT_RUN = "not run"
# How "not run" is shown where the rung cannot be climbed by such an artifact at all.
DOES_NOT_APPLY = "does not apply"
STATUSES = (PASSED, FAILED, NOT_RUN)

QUICK = "quick"
FULL = "full"
SCOPES = (QUICK, FULL)

# What an artifact, an architecture, a hash and a test are called in such a file.
ARCH = r"sm_[1-9][0-9]{1,2}[af]?", "an architecture such as sm_90a"
ARTIFACT_NAME = r"[a-z][a-z0-9_]{0,63}\.sm_[1-9][0-9]{1,2}[af]?", "a kernel and architecture"
SHA256 = r"[0-9a-f]{64}", "64 lower-case hex digits"
TEST_NAMES = r"[A-Za-z_][A-Za-z0-9_]{0,199}"
MAX_NAME = 400

# Not deleted: the file holds what GPUs did, which no command here can find out again.
_REPAIR = "restore it with git (git checkout -- evidence.json in its folder)"


class EvidenceError(Exception):
    """An evidence or record file that is not what its schema says."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one rung found about one artifact.

    figures: what was measured, JSON values. reason: why it failed or was not run. assumptions: what
    the result rests on. checker: who judged, see `checkers.present`. applies: False where the rung
    cannot be climbed by such an artifact at all (SentryWard knows no wgmma): then "not run" is no
    failure of a run that asked for the rung.
    """

    status: str
    scope: str = FULL
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    applies: bool = True
    checker: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES} (got {self.status!r})")
        if self.scope not in SCOPES:
            raise ValueError(f"scope: expected one of {SCOPES} (got {self.scope!r})")
        if self.status != PASSED and not self.reason:
            raise ValueError(f"reason: a result that is {self.status!r} says why")


def not_run(reason: str, *, applies: bool = True) -> Result:
    """The result of a rung that was not climbed."""
    return Result(status=NOT_RUN, reason=reason, applies=applies)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Everything known about one pair of hashes; `artifact` names it for readers of the file."""

    artifact: str
    cubin_sha256: str
    ptx_sha256: str
    rungs: Mapping[str, Result]


@dataclass(frozen=True)
class Evidence:
    """Entries by (cubin sha256, PTX sha256)."""

    entries: Mapping[tuple[str, str], Entry] = field(default_factory=dict)

    def of(self, kernel: Kernel) -> Mapping[str, Result]:
        """Each rung's result for exactly these bytes by the present checker, by rung."""
        stored = self.stored(kernel)
        return {rung: stored[rung] for rung in stored if is_present(rung, stored[rung].checker)}

    def stored(self, kernel: Kernel) -> Mapping[str, Result]:
        """Each rung's result for exactly these bytes, whoever judged."""
        entry = self.entries.get((kernel.cubin_sha256, kernel.ptx_sha256))
        return entry.rungs if entry else {}

    def with_result(self, kernel: Kernel, rung: str, result: Result) -> Evidence:
        """This evidence with one more result, where it says more than what is there."""
        if rung not in RUNGS:
            raise ValueError(f"rung: expected one of {RUNGS} (got {rung!r})")
        known = self.of(kernel)
        if rung in known and not _replaces(known[rung], result):
            return self
        entry = Entry(
            artifact=kernel.key,
            cubin_sha256=kernel.cubin_sha256,
            ptx_sha256=kernel.ptx_sha256,
            rungs={**self.stored(kernel), rung: result},
        )
        return Evidence({**self.entries, (kernel.cubin_sha256, kernel.ptx_sha256): entry})

    def only(self, kernels: Iterable[Kernel]) -> Evidence:
        """Without what was measured on bytes that are no longer there."""
        pairs = {(kernel.cubin_sha256, kernel.ptx_sha256) for kernel in kernels}
        return Evidence({pair: self.entries[pair] for pair in self.entries if pair in pairs})


def _replaces(old: Result, new: Result) -> bool:
    """What says less than a stored result on the same bytes does not erase it; a failure does."""
    if new.status == NOT_RUN:
        return old.status == NOT_RUN
    # A quick pass has not looked where a full climb passed, or failed.
    says_less = (new.status, new.scope, old.scope) == (PASSED, QUICK, FULL)
    return old.status == NOT_RUN or not says_less


def read_evidence(path: Path) -> Evidence:
    """Read the file's evidence, empty if there is no file; EvidenceError if it is not readable."""
    try:
        return _parse(read_file(path, most_bytes=MAX_JSON_BYTES), path)
    except FileNotFoundError:
        return Evidence()
    except OSError as error:
        place = printable(str(path), MAX_FILE_SHOWN)
        raise EvidenceError(f"{place}: cannot be read ({reason_of(error)}); {_REPAIR}") from error


def _parse(text: bytes, path: Path) -> Evidence:
    try:
        return read_json(text, _evidence, source=str(path))
    except ManifestError as error:
        place = printable(str(path), MAX_FILE_SHOWN)
        problem = printable(error.problem, MAX_PROBLEM_SHOWN)
        raise EvidenceError(f"{place}: {error.path}: {problem}; {_REPAIR}") from error


def update_evidence(path: Path, change: Callable[[Evidence], Evidence]) -> Evidence:
    """Read, change and write, one process at a time, so that none loses what another found."""
    with evidence_lock(path):
        evidence = change(read_evidence(path))
        write_evidence(path, evidence)
    return evidence


@contextlib.contextmanager
def evidence_lock(path: Path) -> Iterator[None]:
    """Hold a lock of the folder's, waiting for it. The kernel's: it goes with the process.

    Beside the folder, since a build exchanges the folder for a new one.
    """
    lock = path.resolve().parent
    name = lock.with_name(f".{lock.name}.{path.name}.lock")
    # O_RDWR: opening a FIFO for writing alone waits for its reader.
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write by rename. Sorted, no times: the same evidence gives the same bytes.

    The text is parsed before it takes the old one's place: EvidenceError if no reader took it.
    """
    entries = sorted(evidence.entries.values(), key=lambda e: (e.artifact, e.cubin_sha256))
    document = {
        "schema_version": SCHEMA_VERSION,
        "evidence": [
            {
                "artifact": entry.artifact,
                "cubin_sha256": entry.cubin_sha256,
                "ptx_sha256": entry.ptx_sha256,
                "rungs": {rung: result_json(entry.rungs[rung]) for rung in entry.rungs},
            }
            for entry in entries
        ],
    }
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    _parse(text.encode(), path)
    # A dot first: the artifact folder's closed set does not look at such names.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def result_json(result: Result) -> dict[str, Any]:
    """A result as it is stored; what is at its default is left out."""
    stored: dict[str, Any] = {"status": result.status, "scope": result.scope}
    if result.reason:
        stored["reason"] = result.reason
    if result.figures:
        stored["figures"] = dict(result.figures)
    if result.assumptions:
        stored["assumptions"] = list(result.assumptions)
    if not result.applies:
        stored["applies"] = False
    if result.checker:
        stored["checker"] = result.checker
    return stored


def _evidence(node: JsonNode) -> Evidence:
    check_version(node, SCHEMA_VERSION)
    nodes = node.members("schema_version", "evidence")["evidence"].items("a list of entries")
    entries: dict[tuple[str, str], Entry] = {}
    for item in nodes:
        entry = _entry(item)
        pair = (entry.cubin_sha256, entry.ptx_sha256)
        if pair in entries:
            raise item.error(f"a second entry of the bytes of {entries[pair].artifact}")
        entries[pair] = entry
    return Evidence(entries)


def check_version(node: JsonNode, version: int) -> None:
    """Refuse another schema version, before one of its keys is refused as unknown."""
    if not isinstance(node.value, dict):
        raise node.expected("an object")
    stated = node.member("schema_version")
    if not stated.is_int() or stated.value != version:
        raise stated.expected(f"{version}, the only schema that is read here")


def _entry(node: JsonNode) -> Entry:
    at = node.members("artifact", "cubin_sha256", "ptx_sha256", "rungs")
    rungs = at["rungs"].mapping(_result, keys=RUNGS)
    # In the order they are climbed.
    by_rung = {rung: rungs[rung] for rung in RUNGS if rung in rungs}
    for rung in by_rung:
        _check_figures(at["rungs"].member(rung), rung, by_rung[rung])
    return Entry(
        artifact=at["artifact"].string(*ARTIFACT_NAME),
        cubin_sha256=at["cubin_sha256"].string(*SHA256),
        ptx_sha256=at["ptx_sha256"].string(*SHA256),
        rungs=by_rung,
    )


def _result(node: JsonNode) -> Result:
    optional = ("reason", "figures", "assumptions", "applies", "checker")
    at = node.members("status", "scope", optional=optional)
    status = at["status"].choice(STATUSES)
    reason = at["reason"].text("a reason", MAX_JSON_BYTES) if "reason" in at else ""
    if status != PASSED and not reason:
        raise node.error(f'a result that is "{status}" gives no reason')
    figures = at["figures"].plain() if "figures" in at else {}
    if not isinstance(figures, dict):
        raise at["figures"].expected("an object")
    texts = at["assumptions"].items("a list of assumptions") if "assumptions" in at else []
    return Result(
        status=status,
        scope=at["scope"].choice(SCOPES),
        reason=reason,
        figures=figures,
        assumptions=tuple(item.text("an assumption", MAX_JSON_BYTES) for item in texts),
        applies=at["applies"].boolean() if "applies" in at else True,
        checker=at["checker"].text("a checker", MAX_NAME) if "checker" in at else "",
    )


def _check_figures(node: JsonNode, rung: str, result: Result) -> None:
    """Refuse figures of another shape than a table or a merge reads."""
    figures = node.member("figures")
    if rung == "hardware":
        # What ran, or failed, on a GPU says on which.
        if result.status != NOT_RUN and not result.figures.get("records"):
            raise node.error(f"hardware {result.status} without its records")
        if "records" in result.figures:
            for run in figures.member("records").items("a list of records"):
                _check_run(run)
    elif (shape := _SHOWN_FIGURES[rung]) and next(iter(shape)) in result.figures:
        for name, check in shape.items():
            check(figures.member(name))


def _check_run(node: JsonNode) -> None:
    """Check one run on a GPU (see `hardware`); older runs have no arch and no counts by test."""
    at = node.members("gpu", "cases", "failed", optional=("arch", "driver", "date", "tests"))
    at["cases"].integer(low=1)
    for name in ("gpu", "driver", "date"):
        if name in at:
            at[name].text("a name", MAX_NAME, least=1)
    if "arch" in at:
        at["arch"].string(*ARCH)
    if "tests" in at:
        at["tests"].mapping(lambda count: count.integer(low=1), keys=TEST_NAMES)
    for item in at["failed"].items("a list of tests"):
        item.text("a test", MAX_NAME, least=1)


def _counts(node: JsonNode) -> None:
    node.mapping(lambda item: item.integer(), keys=r".*")


# By rung, the figures that `verify` shows: all of them, if the first is there.
_SHOWN_FIGURES: Mapping[str, Mapping[str, Callable[[JsonNode], object]]] = {
    "structure": {"registers": JsonNode.integer, "paired_instructions": _counts},
    "lint": {"diagnostics": JsonNode.integer, "explained": JsonNode.integer},
    "protocol": {"race_free": lambda node: node.items("a list of cases")},
    "emulated": {
        "cases": lambda node: node.items("a list of cases"),
        "runs": JsonNode.integer,
    },
}


def standing(evidence: Evidence, kernel: Kernel) -> dict[str, str]:
    """Each rung's status for `list`: "passed", "passed (quick)", "failed", "not run", ..."""
    known = evidence.of(kernel)
    return {rung: _standing(known.get(rung)) for rung in RUNGS}


def _standing(result: Result | None) -> str:
    if result is None:
        return NOT_RUN
    if not result.applies:
        return DOES_NOT_APPLY
    quick = result.status == PASSED and result.scope == QUICK
    return f"{result.status} (quick)" if quick else result.status


def validated_on(evidence: Evidence, kernel: Kernel) -> str:
    """The GPUs these very bytes ran on and passed, or "nowhere". Not where they can load."""
    result = evidence.of(kernel).get("hardware")
    if result is None or result.status != PASSED:
        return "nowhere"
    return ", ".join(sorted({str(record["gpu"]) for record in result.figures["records"]}))
