"""What was shown about an artifact's bytes, by which rung, and the file that keeps it.

Pure: reads and writes JSON, runs nothing. Evidence belongs to a pair of hashes, the cubin's and its
PTX's, and is looked up by them: when the bytes change it is stale, and stale evidence counts as
none. Whatever was not run says "not run" and why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv4_router_runtime.manifest import Kernel

SCHEMA_VERSION = 1

# In the order they are climbed.
RUNGS = ("structure", "lint", "protocol", "emulated", "hardware")

PASSED = "passed"
FAILED = "failed"
NOT_RUN = "not run"
STATUSES = (PASSED, FAILED, NOT_RUN)

QUICK = "quick"
FULL = "full"
SCOPES = (QUICK, FULL)


class EvidenceError(Exception):
    """An evidence or record file that is not what its schema says."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one rung found about one artifact.

    figures: what was measured, JSON values. reason: why it failed or was not run. assumptions: what
    the result rests on. applies: False where the rung cannot be climbed by such an artifact at all
    (SentryWard knows no wgmma): then "not run" is no failure of a run that asked for the rung.
    """

    status: str
    scope: str = FULL
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    applies: bool = True

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
        """Each rung's result for exactly these bytes, by rung; empty where there is none."""
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
            rungs={**known, rung: result},
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
        raise EvidenceError(f"{path}: not valid JSON ({error}); delete it and verify") from error
    try:
        if document["schema_version"] != SCHEMA_VERSION:
            version = document["schema_version"]
            raise EvidenceError(f"{path}: schema_version {version}, expected {SCHEMA_VERSION}")
        entries = [_entry(item) for item in document["evidence"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvidenceError(f"{path}: {error!r}; delete it and verify again") from error
    return Evidence({(entry.cubin_sha256, entry.ptx_sha256): entry for entry in entries})


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
    return stored


def _entry(item: Mapping[str, Any]) -> Entry:
    rungs = {rung: _result(item["rungs"][rung]) for rung in RUNGS if rung in item["rungs"]}
    if unknown := sorted(set(item["rungs"]) - set(RUNGS)):
        raise ValueError(f"unknown rungs {unknown}")
    return Entry(
        artifact=str(item["artifact"]),
        cubin_sha256=str(item["cubin_sha256"]),
        ptx_sha256=str(item["ptx_sha256"]),
        rungs=rungs,
    )


def _result(stored: Mapping[str, Any]) -> Result:
    known = {"status", "scope", "reason", "figures", "assumptions", "applies"}
    if unknown := sorted(set(stored) - known):
        raise ValueError(f"unknown keys {unknown} in a result")
    return replace(
        Result(status=PASSED),
        **{**stored, "assumptions": tuple(stored.get("assumptions", ()))},
    )


def standing(evidence: Evidence, kernel: Kernel) -> dict[str, str]:
    """Each rung's status for `list`: "passed", "passed (quick)", "failed" or "not run"."""
    known = evidence.of(kernel)
    words = {}
    for rung in RUNGS:
        result = known.get(rung)
        quick = result is not None and result.status == PASSED and result.scope == QUICK
        words[rung] = (result.status if result else NOT_RUN) + (" (quick)" if quick else "")
    return words


def validated_on(evidence: Evidence, kernel: Kernel) -> str:
    """The GPUs these very bytes ran on and passed, or "nowhere". Not where they can load."""
    result = evidence.of(kernel).get("hardware")
    if result is None or result.status != PASSED:
        return "nowhere"
    return ", ".join(sorted({str(record["gpu"]) for record in result.figures["records"]}))
