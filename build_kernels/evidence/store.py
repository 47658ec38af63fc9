"""The evidence file: the results of the rungs, by the bytes that they were found on.

Evidence belongs to a pair of hashes, the cubin's and its PTX's, and to the launch that the manifest
states. It is stale after the bytes or the launch change, or if another checker than the present one
found it (see `rungs.rung.Checker`). Stale evidence counts as none. This module runs no rung.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from build_kernels.files import replace_file
from dsv4_router_runtime.artifacts.json_reader import SHA256, JsonNode
from dsv4_router_runtime.artifacts.kernel import Kernel, launch_sha256

from .document import ARTIFACT_NAME, Document
from .result import FULL, NOT_RUN, PASSED, QUICK, Result, parse_result, result_json
from .rungs import RUNGS, hardware

# Not deleted: the file holds GPU results, which no command here can find out again.
_ADVICE = "{}; restore it with git (git checkout -- evidence.json in its folder)"


@dataclass(frozen=True, kw_only=True)
class ArtifactEvidence:
    """The stored results for one pair of hashes; `artifact` names it for readers of the file.

    launch_sha256: of the launch that they were found with; empty in entries of before it was kept.
    """

    artifact: str
    cubin_sha256: str
    ptx_sha256: str
    rungs: Mapping[str, Result]
    launch_sha256: str = ""


@dataclass(frozen=True)
class Evidence:
    """The evidence of artifacts by (cubin sha256, PTX sha256)."""

    entries: Mapping[tuple[str, str], ArtifactEvidence] = field(default_factory=dict)

    def of(self, kernel: Kernel) -> Mapping[str, Result]:
        """Return the results for exactly these bytes by the present checkers, by rung."""
        stored = self.stored(kernel)
        return {
            rung: result
            for rung, result in stored.items()
            if RUNGS[rung].is_present(result.checker)
        }

    def stored(self, kernel: Kernel) -> Mapping[str, Result]:
        """Return the results for exactly these bytes and this launch by any checker, by rung."""
        entry = self.entries.get((kernel.cubin_sha256, kernel.ptx_sha256))
        if entry is None or entry.launch_sha256 not in ("", launch_sha256(kernel)):
            return {}
        return entry.rungs

    def with_result(self, kernel: Kernel, rung: str, result: Result) -> Evidence:
        """Return this evidence with one more result, unless a stored one shows more."""
        if rung not in RUNGS:
            raise ValueError(f"rung: expected one of {tuple(RUNGS)} (got {rung!r})")
        known = self.of(kernel)
        if rung in known and not _replaces(known[rung], result):
            return self
        entry = ArtifactEvidence(
            artifact=kernel.key,
            cubin_sha256=kernel.cubin_sha256,
            ptx_sha256=kernel.ptx_sha256,
            rungs={**self.stored(kernel), rung: result},
            launch_sha256=launch_sha256(kernel),
        )
        return Evidence({**self.entries, (kernel.cubin_sha256, kernel.ptx_sha256): entry})

    def only(self, kernels: Iterable[Kernel]) -> Evidence:
        """Return this evidence without that of other bytes than these kernels'."""
        pairs = {(kernel.cubin_sha256, kernel.ptx_sha256) for kernel in kernels}
        return Evidence({pair: self.entries[pair] for pair in self.entries if pair in pairs})


def _replaces(old: Result, new: Result) -> bool:
    """Decide between two results on the same bytes: less does not erase more, a failure does."""
    if new.status == NOT_RUN:
        return old.status == NOT_RUN
    # A quick pass covers less than a full climb that passed or failed.
    covers_less = (new.status, new.scope, old.scope) == (PASSED, QUICK, FULL)
    return old.status == NOT_RUN or not covers_less


def read_evidence(path: Path) -> Evidence:
    """Read the file's evidence, empty if there is no file; EvidenceError if it is not readable."""
    return _DOCUMENT.read(path)


def update_evidence(path: Path, change: Callable[[Evidence], Evidence]) -> Evidence:
    """Read, change and write under a lock, so that no process loses another's results."""
    with evidence_lock(path):
        evidence = change(read_evidence(path))
        write_evidence(path, evidence)
    return evidence


@contextlib.contextmanager
def evidence_lock(path: Path) -> Iterator[None]:
    """Wait for the lock of the folder and hold it. The kernel frees it if the process ends.

    The lock lies beside the folder, since a build exchanges the folder for a new one.
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
    """Replace the file. EvidenceError, with the old file kept, if the new text is unreadable."""
    entries = sorted(evidence.entries.values(), key=lambda e: (e.artifact, e.cubin_sha256))
    members = [
        {
            "artifact": entry.artifact,
            "cubin_sha256": entry.cubin_sha256,
            "ptx_sha256": entry.ptx_sha256,
            "rungs": {rung: result_json(entry.rungs[rung]) for rung in entry.rungs},
            **({"launch_sha256": entry.launch_sha256} if entry.launch_sha256 else {}),
        }
        for entry in entries
    ]
    text = _DOCUMENT.text({"evidence": members})
    _DOCUMENT.parse_text(text, path)
    replace_file(path, text)


def _parse_evidence(node: JsonNode) -> Evidence:
    nodes = node.members("schema_version", "evidence")["evidence"].items("a list of entries")
    entries: dict[tuple[str, str], ArtifactEvidence] = {}
    for item in nodes:
        entry = _parse_artifact(item)
        pair = (entry.cubin_sha256, entry.ptx_sha256)
        if pair in entries:
            raise item.error(f"a second entry of the bytes of {entries[pair].artifact}")
        entries[pair] = entry
    return Evidence(entries)


def _parse_artifact(node: JsonNode) -> ArtifactEvidence:
    launch = "launch_sha256"
    at = node.members("artifact", "cubin_sha256", "ptx_sha256", "rungs", optional=(launch,))
    results = at["rungs"].mapping(parse_result, keys=tuple(RUNGS))
    by_rung = {rung: results[rung] for rung in RUNGS if rung in results}
    for rung, result in by_rung.items():
        RUNGS[rung].check_figures(at["rungs"].member(rung), result)
    return ArtifactEvidence(
        artifact=at["artifact"].string(*ARTIFACT_NAME),
        cubin_sha256=at["cubin_sha256"].string(*SHA256),
        ptx_sha256=at["ptx_sha256"].string(*SHA256),
        rungs=by_rung,
        launch_sha256=at[launch].string(*SHA256) if launch in at else "",
    )


_DOCUMENT = Document(
    version=1,
    parse=_parse_evidence,
    unreadable=_ADVICE,
    invalid=_ADVICE,
    missing=Evidence(),
)


def standing(evidence: Evidence, kernel: Kernel) -> dict[str, str]:
    """Return each rung's status for `list`; see `Result.shown_status`."""
    known = evidence.of(kernel)
    return {rung: known[rung].shown_status if rung in known else NOT_RUN for rung in RUNGS}


def validated_on(evidence: Evidence, kernel: Kernel) -> str:
    """Return the GPUs on which these bytes ran and passed, or "nowhere"; not where they load."""
    result = evidence.of(kernel).get(hardware.RUNG.name)
    if result is None or result.status != PASSED:
        return "nowhere"
    return ", ".join(sorted({str(record["gpu"]) for record in result.figures["records"]}))
