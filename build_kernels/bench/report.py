"""Hold a run's figures: their ratios, and the JSON file that keeps them.

Pure: no torch. Times are microseconds per call.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from build_kernels.errors import BuilderError
from build_kernels.evidence.document import Document
from build_kernels.files import replace_file
from build_kernels.kernels.shapes import MAX_DECODE_TOKENS
from dsv4_router_runtime.artifacts.files import MAX_JSON_BYTES
from dsv4_router_runtime.artifacts.json_reader import MAX_INTEGER, JsonNode

COLD, WARM, EAGER, HOST = "cold", "warm", "eager", "host"
MODES = (COLD, WARM, EAGER)
BEHIND_PDL, BEHIND_PLAIN, BEHIND_TORCH = "behind PDL norm", "behind plain norm", "behind torch norm"
BEHIND_READ = "behind PDL norm, ids read"
BEHIND = (BEHIND_PDL, BEHIND_PLAIN, BEHIND_TORCH, BEHIND_READ)
MODE_WORDS = {
    COLD: "CUDA graph, a weight of its own for every call: W_gate comes from HBM",
    WARM: "CUDA graph, one weight for all calls: W_gate stays in L2",
    EAGER: "no graph: host and device together",
    HOST: "no graph: until the call returns to its caller, without a wait for the device",
    BEHIND_PDL: "CUDA graph, cold: an RMSNorm with PDL that triggers its dependents, then the "
    "router; less the norm alone",
    BEHIND_PLAIN: "CUDA graph, cold: the same RMSNorm without PDL, then the router; less the norm "
    "alone",
    BEHIND_TORCH: "CUDA graph, cold: torch's rms_norm, then the router; less the norm alone",
    BEHIND_READ: "CUDA graph, cold: an RMSNorm with PDL, the router, then a reader of the ids with "
    "PDL; less the norm and the reader",
}
OURS, OWN, PEER, VARIANT = "ours", "own", "peer", "variant"
EMPTY, READ, MMA = "empty", "read W", "MMA floor"
# The fastest BF16 matrix product measured on one, in FLOP/s. The datasheet's 989e12 is not reached.
MMA_CEILINGS = {"NVIDIA H200": 790e12}

MAX_REASON = 300


class ReportError(BuilderError):
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
        cell = shape, mode, num_tokens, contender
        found = (f for f in self.figures if (f.shape, f.mode, f.num_tokens, f.contender) == cell)
        return next((figure.microseconds for figure in found), None)

    def floor(self, shape: str, mode: str, name: str) -> float | None:
        found = (f for f in self.floors if (f.shape, f.mode, f.name) == (shape, mode, name))
        return next((floor.microseconds for floor in found), None)

    def mma_floor(self, problem: Problem, num_tokens: int) -> float | None:
        """Compute the time of the products at the GPU's ceiling; None if that is not known."""
        ceiling = MMA_CEILINGS.get(self.machine.gpu)
        operations = 2 * num_tokens * problem.k * problem.num_experts
        return None if ceiling is None else operations / ceiling * 1e6

    @property
    def has_prefill(self) -> bool:
        """Return whether an N is beyond the decode kernels'."""
        return any(count > MAX_DECODE_TOKENS for count in self.method.num_tokens)

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
    replace_file(path, _DOCUMENT.text(asdict(report)))


def read_report(path: Path) -> Report:
    """Read a file of `write_report`; ReportError, with the place in the file, for any other."""
    return _DOCUMENT.read(path)


def _parse_report(node: JsonNode) -> Report:
    report: Report = _parse(Report, node, "schema_version")
    if len(report.of_role(OURS)) != 1:
        raise node.member("contenders").error(f'expected one with the role "{OURS}"')
    return report


def _parse(kind: Any, node: JsonNode, *more: str) -> Any:
    """Read a value as the annotated type `kind`. more: further keys of an object."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        at = node.members(*hints, *more)
        return kind(**{name: _parse(hint, at[name]) for name, hint in hints.items()})
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return tuple(_parse(item, entry) for entry in node.items("a list"))
    if get_origin(kind) is types.UnionType:
        if node.value is None:
            return None
        (kind,) = (option for option in get_args(kind) if option is not types.NoneType)
    if kind is str:
        return node.text("a text", MAX_JSON_BYTES)
    if kind is int:
        return node.integer(low=-MAX_INTEGER)
    if not node.is_int() and not isinstance(node.value, float):
        raise node.expected("a number")
    return float(node.value)


_DOCUMENT = Document(
    version=1,
    parse=_parse_report,
    unreadable="{}",
    invalid="{}; write the file with `build-kernels bench --json FILE`",
    error=ReportError,
)
