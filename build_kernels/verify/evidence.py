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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv4_router_runtime.manifest import Kernel

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
    """The file's evidence, empty if there is no file; EvidenceError if it is not readable."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Evidence()
    except ValueError as error:
        raise EvidenceError(f"{path}: not valid JSON ({error}); {_REPAIR}") from error
    try:
        if document["schema_version"] != SCHEMA_VERSION:
            version = document["schema_version"]
            raise EvidenceError(
                f"{path}: schema_version {version}, expected {SCHEMA_VERSION}; {_REPAIR}"
            )
        entries = [_entry(item) for item in document["evidence"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvidenceError(f"{path}: {error!r}; {_REPAIR}") from error
    return Evidence({(entry.cubin_sha256, entry.ptx_sha256): entry for entry in entries})


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
    with lock.with_name(f".{lock.name}.{path.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write by rename. Sorted, no times: the same evidence gives the same bytes."""
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
    # A dot first: the artifact folder's closed set does not look at such names.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
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


def _entry(item: Mapping[str, Any]) -> Entry:
    rungs = {rung: _result(item["rungs"][rung]) for rung in RUNGS if rung in item["rungs"]}
    if unknown := sorted(set(item["rungs"]) - set(RUNGS)):
        raise ValueError(f"unknown rungs {unknown}")
    hardware = rungs.get("hardware")
    if hardware and hardware.status != NOT_RUN and not _are_records(hardware.figures):
        raise ValueError(f"{item['artifact']}: hardware {hardware.status} without its records")
    return Entry(
        artifact=str(item["artifact"]),
        cubin_sha256=str(item["cubin_sha256"]),
        ptx_sha256=str(item["ptx_sha256"]),
        rungs=rungs,
    )


def _result(stored: Mapping[str, Any]) -> Result:
    known = {"status", "scope", "reason", "figures", "assumptions", "applies", "checker"}
    if unknown := sorted(set(stored) - known):
        raise ValueError(f"unknown keys {unknown} in a result")
    if not isinstance(stored.get("figures", {}), Mapping):
        raise ValueError(f"figures: expected an object (got {stored['figures']!r})")
    return replace(
        Result(status=PASSED),
        **{**stored, "assumptions": tuple(stored.get("assumptions", ()))},
    )


def _are_records(figures: Mapping[str, Any]) -> bool:
    """Is there a record of at least one run, each with its GPU and its number of cases?"""
    records = figures.get("records")
    return (
        isinstance(records, list)
        and bool(records)
        and all(isinstance(each, dict) and {"gpu", "cases"} <= set(each) for each in records)
    )


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
