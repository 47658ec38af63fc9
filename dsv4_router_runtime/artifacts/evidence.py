"""Read the statuses that evidence.json records for a kernel's bytes. Pure.

The builder writes the file, checks its whole schema and decides which checkers are out of date
(build_kernels/evidence). A server only reports the statuses as they were recorded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4_router_runtime.errors import ArtifactError, ManifestError

from .files import MAX_JSON_BYTES, read_file, reason_of
from .folder import EVIDENCE_NAME
from .json_reader import MAX_SHOWN, JsonNode, read_json
from .kernel import Kernel, launch_sha256

PASSED, FAILED, NOT_RUN = STATUSES = ("passed", "failed", "not run")
# The rung whose records name the GPUs that ran the bytes.
HARDWARE = "hardware"
_NEXT_STEP = "restore it with git (git checkout -- evidence.json), or install the package again"


@dataclass(frozen=True, kw_only=True)
class KernelEvidence:
    """Recorded status by rung, and the GPUs on which the bytes ran and passed.

    launch_sha256: of the launch that they were found with; empty in entries of before it was kept.
    """

    rungs: Mapping[str, str]
    gpus: tuple[str, ...] = ()
    launch_sha256: str = ""

    def with_status(self, status: str) -> tuple[str, ...]:
        """Return the rungs of one status, sorted."""
        return tuple(sorted(rung for rung in self.rungs if self.rungs[rung] == status))


@dataclass(frozen=True, kw_only=True)
class EvidenceSummary:
    """The evidence of a folder, by (cubin sha256, PTX sha256)."""

    entries: Mapping[tuple[str, str], KernelEvidence]

    def of(self, kernel: Kernel) -> KernelEvidence | None:
        """Return the evidence for exactly this kernel's bytes and launch, None if there is none."""
        found = self.entries.get((kernel.cubin_sha256, kernel.ptx_sha256))
        if found is None or found.launch_sha256 not in ("", launch_sha256(kernel)):
            return None
        return found


def read_summary(folder: Path) -> EvidenceSummary:
    """Read a folder's evidence, empty if it has no such file; ArtifactError if it is unreadable."""
    file = os.path.join(folder, EVIDENCE_NAME)
    try:
        return read_json(read_file(file, most_bytes=MAX_JSON_BYTES), _summary, source=file)
    except FileNotFoundError:
        return EvidenceSummary(entries={})
    except OSError as error:
        problem = f"cannot be read ({reason_of(error)})"
        raise ArtifactError(file=file, problem=problem, next_step=_NEXT_STEP) from error
    except ManifestError as error:
        problem = f"{error.path}: {error.problem}"
        raise ArtifactError(file=file, problem=problem, next_step=_NEXT_STEP) from error


def _summary(node: JsonNode) -> EvidenceSummary:
    entries: dict[tuple[str, str], KernelEvidence] = {}
    for item in node.members("schema_version", "evidence")["evidence"].items("a list of entries"):
        at = item.members(
            *("artifact", "cubin_sha256", "ptx_sha256", "rungs"), optional=("launch_sha256",)
        )
        hashes = (str(at["cubin_sha256"].value), str(at["ptx_sha256"].value))
        if hashes in entries:
            raise item.error("a second entry of the same bytes")
        rungs = at["rungs"].mapping(_object, keys=r"[a-z]+")
        entries[hashes] = KernelEvidence(
            rungs={name: rung.member("status").choice(STATUSES) for name, rung in rungs.items()},
            gpus=_gpus(rungs[HARDWARE]) if HARDWARE in rungs else (),
            launch_sha256=str(at["launch_sha256"].value) if "launch_sha256" in at else "",
        )
    return EvidenceSummary(entries=entries)


def _gpus(rung: JsonNode) -> tuple[str, ...]:
    if rung.member("status").value != PASSED:
        return ()
    records = _object(rung.member("figures")).member("records").items("a list of records")
    names = {_object(each).member("gpu").text("a GPU's name", MAX_SHOWN) for each in records}
    return tuple(sorted(names))


def _object(node: JsonNode) -> JsonNode:
    if not isinstance(node.value, dict):
        raise node.expected("an object")
    return node
