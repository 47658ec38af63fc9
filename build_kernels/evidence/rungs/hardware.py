"""Rung `hardware`: merge the GPU tests' records of runs of the cubin.

Nothing runs here. A test run on a GPU machine writes records with `append_record`; `build-kernels
verify --record FILE` merges them. A record names the bytes that it was measured on; a record of
other bytes is refused.

Records add up: a run on another GPU, driver or day is one more record. A failure on these bytes
stays, whatever passes later. To remove a wrong record (a fault of the test), edit evidence.json by
hand, and give the reason in the commit.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.document import ARTIFACT_NAME, MAX_NAME, Document
from build_kernels.evidence.result import FAILED, NOT_RUN, PASSED, Result, not_run
from build_kernels.files import replace_file
from dsv4_router_runtime.artifacts.json_reader import SHA256, JsonNode
from dsv4_router_runtime.artifacts.kernel import Kernel

from .rung import Reads, Rung, counted

_ARCH = r"sm_[1-9][0-9]{1,2}[af]?", "an architecture such as sm_90a"
# With the parameters, except in records of before.
_TEST_NAMES = r"[A-Za-z_][A-Za-z0-9_]{0,199}(\[[ -~]{0,200}\])?"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One test run of one cubin on one GPU.

    gpu: the device's name. arch: its architecture by the driver, such as sm_90a. driver: the
    version of the CUDA driver or of the kernel module. date: YYYY-MM-DD. cases: the number of cases
    on this artifact by test, with its parameters. failed: the tests that failed.
    """

    artifact: str
    cubin_sha256: str
    ptx_sha256: str
    gpu: str
    arch: str
    driver: str
    date: str
    cases: Mapping[str, int]
    failed: tuple[str, ...] = ()


def append_record(path: Path, record: Record) -> None:
    """Add a record to a file, creating it if needed. Several test processes may do so at once."""
    folder = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Closing frees the lock.
        fcntl.flock(folder, fcntl.LOCK_EX)
        records = [*read_records(path), record] if path.exists() else [record]
        replace_file(path, _DOCUMENT.text({"records": [asdict(item) for item in records]}))
    finally:
        os.close(folder)


def read_records(path: Path) -> tuple[Record, ...]:
    """Read the records of a file; EvidenceError if it is not a file of records."""
    return _DOCUMENT.read(path)


def _parse_records(node: JsonNode) -> tuple[Record, ...]:
    at = node.members("schema_version", "records")
    return tuple(_parse_record(item) for item in at["records"].items("a list of records"))


def _parse_record(node: JsonNode) -> Record:
    at = node.members(*(item.name for item in fields(Record)))
    artifact = at["artifact"].string(*ARTIFACT_NAME)
    cases = at["cases"].mapping(lambda count: count.integer(low=1), keys=_TEST_NAMES)
    if not cases:
        raise node.error(f"the record of {artifact} names no case")
    return Record(
        artifact=artifact,
        cubin_sha256=at["cubin_sha256"].string(*SHA256),
        ptx_sha256=at["ptx_sha256"].string(*SHA256),
        gpu=at["gpu"].text("a GPU's name", MAX_NAME, least=1),
        arch=at["arch"].string(*_ARCH),
        driver=at["driver"].text("a driver's version", MAX_NAME, least=1),
        date=at["date"].text("a date", MAX_NAME, least=1),
        cases=dict(cases),
        failed=tuple(
            item.text("a test", MAX_NAME, least=1) for item in at["failed"].items("a list of tests")
        ),
    )


def result_of(
    kernel: Kernel, records: Iterable[Record], stored: Result | None = None
) -> Result | None:
    """Merge the stored result and the records of exactly these bytes.

    None if there is no record of them, so that the stored result stands.
    """
    mine = [
        record
        for record in records
        if (record.cubin_sha256, record.ptx_sha256) == (kernel.cubin_sha256, kernel.ptx_sha256)
    ]
    if not mine:
        return None
    runs = list(stored.figures["records"]) if stored and stored.status != NOT_RUN else []
    for record in mine:
        _add(runs, _run_of(record))
    runs.sort(key=_key)
    figures = {"records": runs, "cases": sum(run["cases"] for run in runs)}
    if failed := sorted({test for run in runs for test in run["failed"]}):
        return Result(status=FAILED, reason="; ".join(failed), figures=figures)
    return Result(status=PASSED, figures=figures)


def _run_of(record: Record) -> dict[str, Any]:
    """Return a record as a run in the evidence."""
    return {
        "gpu": record.gpu,
        "arch": record.arch,
        "driver": record.driver,
        "date": record.date,
        "cases": sum(record.cases.values()),
        "tests": dict(record.cases),
        "failed": sorted(record.failed),
    }


def _key(run: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the key that two reports of the same run share."""
    return tuple(str(run.get(name, "")) for name in ("gpu", "driver", "arch", "date"))


def _add(runs: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Add a run, or merge it into the run of the same GPU, driver and day.

    A test in both was run again: the larger count stands, and the failures of either.
    """
    for place, old in enumerate(runs):
        if _key(old) == _key(new) and "tests" in old:
            tests = {
                test: max(old["tests"].get(test, 0), new["tests"].get(test, 0))
                for test in sorted({*old["tests"], *new["tests"]})
            }
            failed = sorted({*old["failed"], *new["failed"]})
            cases = sum(tests.values())
            runs[place] = {**old, "tests": tests, "cases": cases, "failed": failed}
            return
    runs.append(new)


def climb(artifact: Artifact, *, quick: bool) -> Result:
    """Return "not run": only stored records are results of this rung."""
    return not_run(f"no test run on a GPU of {artifact.kernel.arch} is recorded for these bytes")


def _check_runs(node: JsonNode) -> None:
    """Check the stored runs; older ones have no architecture and no counts by test."""
    optional = ("arch", "driver", "date", "tests")
    for run in node.items("a list of records"):
        at = run.members("gpu", "cases", "failed", optional=optional)
        at["cases"].integer(low=1)
        for name in ("gpu", "driver", "date"):
            if name in at:
                at[name].text("a name", MAX_NAME, least=1)
        if "arch" in at:
            at["arch"].string(*_ARCH)
        if "tests" in at:
            at["tests"].mapping(lambda count: count.integer(low=1), keys=_TEST_NAMES)
        for item in at["failed"].items("a list of tests"):
            item.text("a test", MAX_NAME, least=1)


_DOCUMENT = Document(
    version=2,
    parse=_parse_records,
    unreadable="{}",
    invalid="not a file of GPU test records ({})",
)
RUNG = Rung(
    name="hardware",
    climbs=(climb,),
    checker=None,
    reads=Reads.RECORDS,
    cost=0,
    figures={"records": _check_runs},
    describe=lambda shown: [
        f"{run['gpu']}, {counted(run['cases'], 'case', 'cases')}" for run in shown["records"]
    ],
    required="records",
)
