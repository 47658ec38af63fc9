"""Rung: the cubin ran on a GPU of its architecture, as recorded by the gpu tests.

Nothing is run here. A test run on a GPU machine writes records with `append_record`; the file is
brought here and merged with `build-kernels verify --record FILE`. A record names the bytes it was
measured on, so one of other bytes is refused.

Records add up: a run on another GPU, driver or day is one more record, and what failed once on
these bytes stays failed, whatever passed later. A record that was wrong (a fault of the test's) is
taken out of evidence.json by hand, in a change that says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from build_kernels.evidence.artifact import Artifact
from build_kernels.evidence.store import (
    ARCH,
    ARTIFACT_NAME,
    FAILED,
    MAX_NAME,
    NOT_RUN,
    PASSED,
    SHA256,
    TEST_NAMES,
    EvidenceError,
    Result,
    check_version,
    not_run,
)
from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES, read_file, reason_of
from dsv4_router_runtime.artifacts.json_reader import JsonNode, read_json
from dsv4_router_runtime.artifacts.kernel import Kernel
from dsv4_router_runtime.errors import (
    MAX_FILE_SHOWN,
    MAX_PROBLEM_SHOWN,
    ManifestError,
    printable,
)

SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Record:
    """One test run of one cubin on one GPU.

    gpu: the device's name. arch: its architecture, such as sm_90a, as the driver says. driver: the
    CUDA driver's version, or the kernel module's. date: YYYY-MM-DD. cases: test -> how many cases
    it ran on this artifact. failed: the tests that failed, with their parameters.
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
    """Add a record to a file, made if missing, by rename; one test process at a time."""
    records = [*read_records(path), record] if path.exists() else [record]
    document = {
        "schema_version": SCHEMA_VERSION,
        "records": [asdict(item) for item in records],
    }
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    os.replace(partial, path)


def read_records(path: Path) -> tuple[Record, ...]:
    """The records of a file; EvidenceError if it is not one."""
    try:
        return read_json(read_file(path, most_bytes=MAX_JSON_BYTES), _records, source=str(path))
    except OSError as error:
        place = printable(str(path), MAX_FILE_SHOWN)
        raise EvidenceError(f"{place}: cannot be read ({reason_of(error)})") from error
    except ManifestError as error:
        problem = f"{error.path}: {printable(error.problem, MAX_PROBLEM_SHOWN)}"
        place = printable(str(path), MAX_FILE_SHOWN)
        raise EvidenceError(f"{place}: not a file of GPU test records ({problem})") from error


def _records(node: JsonNode) -> tuple[Record, ...]:
    check_version(node, SCHEMA_VERSION)
    at = node.members("schema_version", "records")
    return tuple(_record(item) for item in at["records"].items("a list of records"))


def _record(node: JsonNode) -> Record:
    at = node.members(*(item.name for item in fields(Record)))
    artifact = at["artifact"].string(*ARTIFACT_NAME)
    cases = at["cases"].mapping(lambda count: count.integer(low=1), keys=TEST_NAMES)
    if not cases:
        raise node.error(f"the record of {artifact} names no case")
    return Record(
        artifact=artifact,
        cubin_sha256=at["cubin_sha256"].string(*SHA256),
        ptx_sha256=at["ptx_sha256"].string(*SHA256),
        gpu=at["gpu"].text("a GPU's name", MAX_NAME, least=1),
        arch=at["arch"].string(*ARCH),
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
    """The rung's result from what is stored and the records of exactly these bytes.

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
    """A record as the evidence keeps it."""
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
    """What makes two runs the same one, told in two files or by two commands."""
    return tuple(str(run.get(name, "")) for name in ("gpu", "driver", "arch", "date"))


def _add(runs: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Add a run, or what it ran and failed to the run of the same GPU, driver and day.

    A test that both name was run again: the larger count stands, and either's failures.
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
    """Never run from here: a stored record, where there is one, stands in its place."""
    return not_run(f"no test run on a GPU of {artifact.kernel.arch} is recorded for these bytes")
