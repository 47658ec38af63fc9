"""Predict sm_100a figures on a B200 from those measured on sm_90a: a model, not measured.

It covers N <= 64: of more tokens, the read does not hide the matrix product. A call is taken as the
sum of four terms, each from the same cold run on an H200:

    launch      an empty kernel, unchanged
    read        bytes of W_gate over B200's bandwidth, at the fraction of the datasheet's bandwidth
                that the read-W floor attained on the H200
    exchange    ours at the smallest N beyond the read-W floor: partial sums through the cluster,
                their reduction, the selection of a row, less what PDL overlaps; unchanged
    tokens      ours at N beyond ours at the smallest N: more partial sums, more rows; unchanged

"Unchanged" assumes that these steps are bound by latency, that a step takes as many cycles, and
that clocks are the same. Nothing is added for tensor memory, which sm_100a's MMA writes to and
which has to be read back, and nothing is gained from the 16 SMs that a B200 has more.
"""

from __future__ import annotations

from dataclasses import dataclass

from build_kernels.kernels.shapes import MAX_DECODE_TOKENS

from .report import COLD, EMPTY, OURS, READ, Report

H200_NAME = "NVIDIA H200"
# NVIDIA H200 Tensor Core GPU datasheet: GPU memory bandwidth 4.8 TB/s.
H200_BANDWIDTH = 4.8e12
# NVIDIA Blackwell (HGX B200) datasheet: 8 TB/s of HBM3e for each GPU.
B200_BANDWIDTH = 8.0e12
ASSUMPTIONS = (
    "read at the fraction of the datasheet's bandwidth that the read-W floor attained here "
    f"({H200_BANDWIDTH / 1e12} TB/s here, {B200_BANDWIDTH / 1e12} TB/s there, both datasheets)",
    "launch, exchange and tokens as measured here: bound by latency, the same cycles, equal clocks",
    "no term for reading tensor memory back, none for a B200's more SMs",
)


class NoModelError(Exception):
    """The report lacks figures that the model starts from."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Microseconds per call; `measured` is ours on the H200, the other terms are the model's."""

    num_tokens: int
    measured: float
    launch: float
    read: float
    exchange: float
    tokens: float

    @property
    def total(self) -> float:
        return self.launch + self.read + self.exchange + self.tokens


def attained_fraction(weight_bytes: int, read: float, empty: float) -> float:
    """Return the part of the H200's datasheet bandwidth that the read-W floor attained."""
    return weight_bytes / ((read - empty) * 1e-6) / H200_BANDWIDTH


def predict(report: Report, shape: str) -> tuple[Prediction, ...]:
    """Predict for each measured N; NoModelError if the run lacks figures."""
    if report.machine.gpu != H200_NAME:
        raise NoModelError(f"the model starts from an {H200_NAME} (measured: {report.machine.gpu})")
    (problem,) = (problem for problem in report.problems if problem.name == shape)
    (ours,) = report.of_role(OURS)
    empty, read = report.floor(shape, COLD, EMPTY), report.floor(shape, COLD, READ)
    times = {
        num_tokens: time
        for num_tokens in sorted(report.method.num_tokens)
        if num_tokens <= MAX_DECODE_TOKENS
        and (time := report.microseconds(shape, COLD, num_tokens, ours)) is not None
    }
    if not times or empty is None or read is None or read <= empty:
        raise NoModelError(
            f"{shape}: needs cold figures of ours, an empty kernel and read W at N <= "
            f"{MAX_DECODE_TOKENS}"
        )
    fraction = attained_fraction(problem.weight_bytes, read, empty)
    at_least = times[min(times)]
    return tuple(
        Prediction(
            num_tokens=num_tokens,
            measured=measured,
            launch=empty,
            read=problem.weight_bytes / (B200_BANDWIDTH * fraction) * 1e6,
            exchange=max(0.0, at_least - read),
            tokens=max(0.0, measured - at_least),
        )
        for num_tokens, measured in times.items()
    )
