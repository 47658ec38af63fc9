"""Rung: the cubin ran on a GPU of its architecture, as recorded by the gpu tests.

Nothing is run here. A test run on a GPU machine writes records with `append_record`; the file is
brought here and merged with `build-kernels verify --record FILE`. A record names the bytes it was
measured on, so one of other bytes is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dsv4_router_runtime.manifest import Kernel

from .artifact import Artifact
from .evidence import FAILED, PASSED, EvidenceError, Result, not_run

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """One test run of one cubin on one GPU.

    gpu: the device's name. arch: its architecture, such as sm_90a, as the driver says. driver: the
    CUDA driver's version, or the kernel module's. date: YYYY-MM-DD. cases: what was run, one word
    or sentence for each. failed: those that failed.
    """

    artifact: str
    cubin_sha256: str
    ptx_sha256: str
    gpu: str
    arch: str
    driver: str
    date: str
    cases: tuple[str, ...]
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
        document = json.loads(path.read_bytes())
        if document["schema_version"] != SCHEMA_VERSION:
            version = document["schema_version"]
            raise EvidenceError(f"{path}: schema_version {version}, expected {SCHEMA_VERSION}")
        return tuple(_record(item) for item in document["records"])
    except OSError as error:
        raise EvidenceError(f"{path}: cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvidenceError(f"{path}: not a file of GPU test records ({error!r})") from error


def _record(item: Mapping) -> Record:
    lists = {name: tuple(str(case) for case in item[name]) for name in ("cases", "failed")}
    if not lists["cases"]:
        raise ValueError(f"the record of {item['artifact']} names no case")
    return Record(**{**item, **lists})


def result_of(kernel: Kernel, records: Iterable[Record]) -> Result | None:
    """The rung's result from the records of exactly these bytes; None if there is none."""
    mine = [
        record
        for record in records
        if (record.cubin_sha256, record.ptx_sha256) == (kernel.cubin_sha256, kernel.ptx_sha256)
    ]
    if not mine:
        return None
    runs = [
        {
            "gpu": record.gpu,
            "driver": record.driver,
            "date": record.date,
            "cases": len(record.cases),
            "failed": list(record.failed),
        }
        for record in sorted(mine, key=lambda r: (r.gpu, r.driver, r.date))
    ]
    figures = {"records": runs, "cases": sorted({case for r in mine for case in r.cases})}
    if failed := sorted({case for record in mine for case in record.failed}):
        return Result(status=FAILED, reason="; ".join(failed), figures=figures)
    return Result(status=PASSED, figures=figures)


def climb(artifact: Artifact, *, quick: bool) -> Result:
    """Never run from here: a stored record, where there is one, stands in its place."""
    return not_run(f"no test run on a GPU of {artifact.kernel.arch} is recorded for these bytes")
