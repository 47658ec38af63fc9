"""Which kernel runs a problem: a pure function of the manifest, the problem and the device.

Every kernel of the manifest is a candidate and gets an answer, Accepted or Rejected with a reason,
so that "nothing fits" can say why each one does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dsv4_router_runtime.errors import BUILD_COMMAND, NoKernelError

from .kernel import Kernel, compute_capability
from .limits import MAX_TOKENS
from .manifest import Manifest

# Candidates that a NoKernelError lists: twice those of every build so far, and a screen or two.
MAX_LISTED = 64


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One routing problem. `layout` is one of the manifest's LAYOUTS.

    `dtypes` names every dtype that each tensor may come in, e.g. {"out_ids": ("int32", "int64")}: a
    kernel has to take them all. A tensor that a kernel does not mention, or that is not given here,
    is not compared.
    """

    layout: str
    num_tokens: int
    num_experts: int
    top_k: int
    k: int
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return (
            f"num_tokens={self.num_tokens}, K={self.k}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, layout={self.layout}"
        )


@dataclass(frozen=True, kw_only=True)
class Accepted:
    kernel: Kernel


@dataclass(frozen=True, kw_only=True)
class Rejected:
    kernel: Kernel
    reason: str


def device_arch(major: int, minor: int) -> str:
    """The name of a GPU's own architecture. From 9.0 on that is the `a` target."""
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def runs_on(built_for: str, device: str) -> bool:
    """Whether a cubin built for `built_for` runs on a GPU whose own architecture is `device`.

    An `a` target runs on exactly its architecture; an `f` target and a plain one on the same major
    version from their minor version on.
    """
    have, need = compute_capability(device), compute_capability(built_for)
    if built_for.endswith("a"):
        return have == need
    return have // 10 == need // 10 and have >= need


def resolve(manifest: Manifest, problem: Problem, device: str) -> tuple[Accepted | Rejected, ...]:
    """An answer for every kernel of the manifest, in its order."""
    return tuple(judge(kernel, problem, device) for kernel in manifest.kernels)


def judge(kernel: Kernel, problem: Problem, device: str) -> Accepted | Rejected:
    reason = _reason_against(kernel, problem, device)
    if reason is None:
        return Accepted(kernel=kernel)
    return Rejected(kernel=kernel, reason=reason)


def _reason_against(kernel: Kernel, problem: Problem, device: str) -> str | None:
    accepts = kernel.problem
    if not runs_on(kernel.arch, device):
        return f"built for {kernel.arch}, this GPU is {device}"
    if accepts.layout != problem.layout:
        return f"reads layout {accepts.layout}, this problem is {problem.layout}"
    for name, value, allowed in (
        ("num_tokens", problem.num_tokens, accepts.num_tokens),
        ("num_experts", problem.num_experts, accepts.num_experts),
        ("top_k", problem.top_k, accepts.top_k),
    ):
        if value not in allowed:
            return f"takes {name} {allowed}, got {value}"
    if problem.k % accepts.k_multiple:
        return f"takes K in multiples of {accepts.k_multiple}, got {problem.k}"
    for tensor, taken in accepts.dtypes.items():
        for dtype in problem.dtypes.get(tensor, ()):
            if dtype not in taken:
                return f"takes {tensor} in {' or '.join(taken)}, got {dtype}"
    return None


def select_kernel(manifest: Manifest, problem: Problem, device: str) -> Kernel:
    """The accepted kernel made for the fewest tokens; NoKernelError lists every refusal."""
    candidates = resolve(manifest, problem, device)
    accepted = [item.kernel for item in candidates if isinstance(item, Accepted)]
    if not accepted:
        raise NoKernelError(_no_kernel_message(candidates, problem, device))
    return min(accepted, key=_most_tokens)


def decode_ladder(
    manifest: Manifest, problem: Problem, device: str
) -> tuple[tuple[int, Kernel], ...]:
    """The decode kernels of a bound layer, as ((most tokens, kernel), ...), ascending.

    Starting at one token, each rung takes over where the rung before ends. The ladder ends where no
    kernel accepts the next number of tokens, or no call can bring it. NoKernelError if not even one
    token can be routed.
    """
    kernel = select_kernel(manifest, replace(problem, num_tokens=1), device)
    ladder = [(_most_tokens(kernel), kernel)]
    # A kernel that accepts the next number ends above it: each rung ascends, up to MAX_TOKENS.
    while ladder[-1][0] < MAX_TOKENS:
        beyond = replace(problem, num_tokens=ladder[-1][0] + 1)
        taken = [c.kernel for c in resolve(manifest, beyond, device) if isinstance(c, Accepted)]
        if not taken:
            break
        kernel = min(taken, key=_most_tokens)
        ladder.append((_most_tokens(kernel), kernel))
    return tuple(ladder)


def _most_tokens(kernel: Kernel) -> int:
    high = kernel.problem.num_tokens.high
    return MAX_TOKENS if high is None else min(high, MAX_TOKENS)


def _no_kernel_message(
    candidates: tuple[Accepted | Rejected, ...], problem: Problem, device: str
) -> str:
    lines = [f"no kernel for {problem} on {device}; every candidate was refused:"]
    refused = [c for c in candidates if isinstance(c, Rejected)]
    lines += [f"  {c.kernel.key}: {c.reason}" for c in refused[:MAX_LISTED]]
    if len(refused) > MAX_LISTED:
        lines.append(f"  ... and {len(refused) - MAX_LISTED} more")
    if not candidates:
        lines.append("  (the manifest lists no kernels)")
    lines.append(f"build one with `{BUILD_COMMAND} --arch {device}`")
    return "\n".join(lines)
