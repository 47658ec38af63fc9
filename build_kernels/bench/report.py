"""Hold a run's figures: their ratios, and the JSON file that keeps them.

Pure: no torch. Times are microseconds per call.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from build_kernels.files import replace_file
from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES, read_file, reason_of
from dsv4_router_runtime.artifacts.json_reader import read_json
from dsv4_router_runtime.errors import ManifestError

SCHEMA_VERSION = 1

COLD, WARM, EAGER, HOST = "cold", "warm", "eager", "host"
MODES = (COLD, WARM, EAGER)
MODE_WORDS = {
    COLD: "CUDA graph, a weight of its own for every call: W_gate comes from HBM",
    WARM: "CUDA graph, one weight for all calls: W_gate stays in L2",
    EAGER: "no graph: host and device together",
    HOST: "no graph: until the call returns to its caller, without a wait for the device",
}
OURS, OWN, PEER, VARIANT = "ours", "own", "peer", "variant"
EMPTY, READ = "empty", "read W"

MAX_REASON = 300


class ReportError(Exception):
    """A file that is not a report of the bench."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a run. driver: the kernel module's version, or "unknown"."""

    gpu: str
    arch: str
    driver: str
    cuda: str
    torch: str
    triton: str | None


@dataclass(frozen=True, kw_only=True)
class Method:
    """The method of a run: the matrix of runs, repetitions, seed and tolerances."""

    date: str
    modes: tuple[str, ...]
    num_tokens: tuple[int, ...]
    layout: str
    replays: int
    host_calls: int
    least_weight_bytes: int
    seed: int
    key_tolerance: float
    weight_tolerance: float
    manifest_sha256: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One shape: W_gate [k, num_experts] BF16, in `layers` distinct copies."""

    k: int
    num_experts: int
    top_k: int
    routed_scaling_factor: float
    layers: int

    @property
    def name(self) -> str:
        return f"{self.k}x{self.num_experts}"

    @property
    def weight_bytes(self) -> int:
        return self.k * self.num_experts * 2


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One implementation. role: the ratios divide `ours` by the best `peer`; `own` is in neither.

    A `variant` is divided by the last contender before it that is no variant.
    """

    name: str
    role: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One cell. microseconds: the median, low and high the quartiles; None if not measured."""

    shape: str
    mode: str
    num_tokens: int
    contender: str
    microseconds: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A time that no contender without overlap beats: `name` is EMPTY or READ, `how` the kernel."""

    shape: str
    mode: str
    name: str
    how: str
    microseconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    machine: Machine
    method: Method
    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    figures: tuple[Figure, ...]
    floors: tuple[Floor, ...]

    def microseconds(self, shape: str, mode: str, num_tokens: int, contender: str) -> float | None:
        for figure in self.figures:
            if (figure.shape, figure.mode, figure.num_tokens, figure.contender) == (
                shape,
                mode,
                num_tokens,
                contender,
            ):
                return figure.microseconds
        return None

    def floor(self, shape: str, mode: str, name: str) -> float | None:
        for floor in self.floors:
            if (floor.shape, floor.mode, floor.name) == (shape, mode, name):
                return floor.microseconds
        return None

    def of_role(self, role: str) -> tuple[str, ...]:
        return tuple(contender.name for contender in self.contenders if contender.role == role)

    @property
    def variants(self) -> tuple[tuple[str, str], ...]:
        """Return each variant and the contender that it is divided by."""
        pairs, base = [], ""
        for contender in self.contenders:
            if contender.role == VARIANT:
                pairs.append((contender.name, base))
            else:
                base = contender.name
        return tuple(pairs)

    @property
    def modes(self) -> tuple[str, ...]:
        """Return the modes that have figures, in the order of MODE_WORDS."""
        return tuple(mode for mode in MODE_WORDS if any(f.mode == mode for f in self.figures))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ours beside the best peer and beside the read of the weights, at one N."""

    shape: str
    mode: str
    num_tokens: int
    best_peer: str | None
    to_peer: float | None
    to_read: float | None


def ratio_at(report: Report, shape: str, mode: str, num_tokens: int) -> Ratio:
    """Return the ratios at one N; None without a figure of ours, a peer's, or a floor."""
    (ours_name,) = report.of_role(OURS)
    ours = report.microseconds(shape, mode, num_tokens, ours_name)
    peers = [
        (time, name)
        for name in report.of_role(PEER)
        if (time := report.microseconds(shape, mode, num_tokens, name)) is not None
    ]
    best, best_peer = min(peers, default=(None, None))
    read = report.floor(shape, mode, READ)
    return Ratio(
        shape=shape,
        mode=mode,
        num_tokens=num_tokens,
        best_peer=best_peer,
        to_peer=ours / best if ours and best else None,
        to_read=ours / read if ours and read else None,
    )


def ratios(report: Report, mode: str) -> tuple[Ratio, ...]:
    """Return the ratios of every shape and N of a mode."""
    return tuple(
        ratio_at(report, problem.name, mode, num_tokens)
        for problem in report.problems
        for num_tokens in report.method.num_tokens
    )


def variant_ratio(
    report: Report, shape: str, mode: str, num_tokens: int, pair: tuple[str, str]
) -> float | None:
    """Return the ratio of one of `Report.variants`; None if either has no figure."""
    variant, base = (report.microseconds(shape, mode, num_tokens, name) for name in pair)
    return variant / base if variant and base else None


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of at least one positive number."""
    logarithms = [math.log(value) for value in values]
    if not logarithms:
        raise ValueError("geometric_mean: expected at least one value (got none)")
    return math.exp(math.fsum(logarithms) / len(logarithms))


def in_a_line(error: Exception) -> str:
    """Return an exception's type and the first line of its message; torch's run to pages."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:MAX_REASON]}".removesuffix(": ")


def write_report(path: Path, report: Report) -> None:
    """Write JSON by rename: the file is either the old one or the whole new one."""
    document = {"schema_version": SCHEMA_VERSION} | asdict(report)
    replace_file(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def read_report(path: Path) -> Report:
    """Read a file of `write_report`; ReportError, with the place in the file, for any other."""
    try:
        document = read_json(
            read_file(path, most_bytes=MAX_JSON_BYTES), lambda node: node.plain(), source=str(path)
        )
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({reason_of(error)})") from error
    except ManifestError as error:
        raise ReportError(f"{path}: {error.path}: {error.problem}") from error
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        got = document.get("schema_version") if isinstance(document, dict) else type(document)
        raise ReportError(
            f"{path}: schema_version: expected {SCHEMA_VERSION} (got {got}); "
            "write it with `build-kernels bench --json FILE`"
        )
    del document["schema_version"]
    try:
        report: Report = _parsed(Report, document, "")
    except ValueError as error:
        raise ReportError(f"{path}: {error}") from error
    if len(report.of_role(OURS)) != 1:
        raise ReportError(f'{path}: contenders: expected one with the role "{OURS}"')
    return report


def _parsed(kind: Any, value: Any, path: str) -> Any:
    """Convert a JSON value to the annotated type `kind`; ValueError names the path."""
    if is_dataclass(kind):
        return _parsed_dataclass(kind, value, path)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{path}: expected a list (got {value!r})")
        item = get_args(kind)[0]
        return tuple(_parsed(item, entry, f"{path}[{at}]") for at, entry in enumerate(value))
    if get_origin(kind) is types.UnionType:
        if value is None:
            return None
        (kind,) = (option for option in get_args(kind) if option is not types.NoneType)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{path}: expected {kind.__name__} (got {value!r})")
    return value


def _parsed_dataclass(kind: Any, value: Any, path: str) -> Any:
    names = [field.name for field in fields(kind)]
    if not isinstance(value, dict) or sorted(value) != sorted(names):
        got = sorted(value) if isinstance(value, dict) else repr(value)
        raise ValueError(f"{path or 'report'}: expected {sorted(names)} (got {got})")
    hints = get_type_hints(kind)
    prefix = f"{path}." if path else ""
    return kind(**{name: _parsed(hints[name], value[name], prefix + name) for name in names})
