"""The kernels that serve a layer: a pure function of the manifest, the layer and the architecture.

Every kernel of the manifest is a candidate and gets an answer, Accepted or Rejected with a reason,
so that "no kernel fits" can list why each one does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dsv4_router_runtime.errors import BUILD_COMMAND, NoKernelError
from dsv4_router_runtime.parameters import ABI, FIRST_TOKEN

from .kernel import Kernel, compute_capability
from .limits import MAX_TOKENS
from .manifest import Manifest

# Candidates that a NoKernelError lists: more than every build so far has, and a screen or two.
MAX_LISTED = 64


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One routing problem for a kernel of one role.

    role: one of the manifest's ROLES. layout: W_gate's, one of LAYOUTS; None for a kernel that
    reads logits. same_bits: as in `LayerProblem`. dtypes: every dtype that each tensor may come in,
    e.g. {"out_ids": ("int32", "int64")}; a kernel has to take them all. A tensor that the kernel or
    the problem leaves out is not compared.
    """

    role: str
    layout: str | None
    num_tokens: int
    num_experts: int
    top_k: int
    k: int
    same_bits: bool = False
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return (
            f"role={self.role}, num_tokens={self.num_tokens}, K={self.k}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, layout={self.layout}"
        )


@dataclass(frozen=True, kw_only=True)
class Accepted:
    kernel: Kernel


@dataclass(frozen=True, kw_only=True)
class Rejected:
    kernel: Kernel
    reason: str


def device_arch(major: int, minor: int) -> str:
    """Return the name of a GPU's own architecture. From 9.0 on that is the `a` target."""
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def runs_on(built_for: str, device: str) -> bool:
    """Return whether a cubin built for `built_for` runs on a GPU whose architecture is `device`.

    An `a` target runs on exactly its architecture; an `f` target and a plain one on the same major
    version from their minor version on.
    """
    have, need = compute_capability(device), compute_capability(built_for)
    if built_for.endswith("a"):
        return have == need
    return have // 10 == need // 10 and have >= need


def kernels_on(manifest: Manifest, device: str) -> tuple[Kernel, ...]:
    """Return the kernels that run on a GPU whose architecture is `device`."""
    return tuple(kernel for kernel in manifest.kernels if runs_on(kernel.arch, device))


def resolve(manifest: Manifest, problem: Problem, device: str) -> tuple[Accepted | Rejected, ...]:
    """Judge every kernel of the manifest, in its order."""
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
    if kernel.role != problem.role:
        return f"its role is {kernel.role}, this step needs {problem.role}"
    if accepts.same_bits_only and not problem.same_bits:
        return "slower than a matrix product; it serves layers that ask for same_bits"
    if accepts.layout != problem.layout:
        return f"reads layout {accepts.layout}, W_gate is {problem.layout}"
    for name, value, allowed in (
        ("num_tokens", problem.num_tokens, accepts.num_tokens),
        ("num_experts", problem.num_experts, accepts.num_experts),
        ("top_k", problem.top_k, accepts.top_k),
    ):
        if value not in allowed:
            return f"takes {name} {allowed}, got {value}"
    most = kernel.most_tokens(problem.num_experts)
    if most is not None and problem.num_tokens > most:
        return (
            f"takes at most {kernel.launch.max_clusters} clusters, which are {most} tokens of "
            f"{problem.num_experts} experts, got {problem.num_tokens}"
        )
    if problem.k % accepts.k_multiple:
        return f"takes K in multiples of {accepts.k_multiple}, got {problem.k}"
    for tensor, taken in accepts.dtypes.items():
        for dtype in problem.dtypes.get(tensor, ()):
            if dtype not in taken:
                return f"takes {tensor} in {' or '.join(taken)}, got {dtype}"
    return None


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """The properties of a layer that choose its kernels.

    layout: kmajor or emajor, as W_gate was given. tma_loadable: TMA can step by W_gate's rows.
    hashed: the ids come from a table. has_bias_vl: the ids of image rows do not. same_bits: no call
    may take a matrix product, whose logits have other bits. dtypes: as in `Problem`.
    """

    layout: str
    tma_loadable: bool
    hashed: bool
    num_experts: int
    top_k: int
    k: int
    has_bias_vl: bool = False
    same_bits: bool = False
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kernel of a layer, and the number of tokens up to which it serves; None is no end.

    A kernel of role "select" reads logits: the step is a matrix product and that kernel.
    piece_tokens: the kernel is launched once per so many tokens of a call, a multiple of its token
    tile; None if one launch takes all of them.
    """

    max_tokens: int | None
    kernel: Kernel
    reason: str
    piece_tokens: int | None = None

    @property
    def is_product_and_select(self) -> bool:
        return self.kernel.role == "select"


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The steps of a layer by ascending number of tokens; the last one has no end.

    copy_reason: why W_gate has to be bound as a K-contiguous copy, or None if it is read in place.
    gate_steps: the steps of calls that need the whole gate; empty if they are `steps`.
    rejected: the kernels of steps that were taken out (see `without`).
    """

    steps: tuple[Step, ...]
    copy_reason: str | None
    gate_steps: tuple[Step, ...] = ()
    rejected: tuple[Rejected, ...] = ()

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of `steps` by ascending number of tokens, then those of gate_steps only."""
        steps = {step.kernel.key: step.kernel for step in (*self.steps, *self.gate_steps)}
        return tuple(steps.values())

    def steps_of(self, *, whole_gate: bool) -> tuple[Step, ...]:
        """Return the steps of calls that need the whole gate, or of the others."""
        return self.gate_steps if whole_gate and self.gate_steps else self.steps


# The fused roles that serve a layer, in order: each goes on where the one before it ends. "select"
# follows.
FUSED_GATE_ROLES = ("decode", "prefill")
_ROLES = {False: FUSED_GATE_ROLES, True: ("hash", *FUSED_GATE_ROLES)}
_PURPOSE = {
    "hash": "reads the rows of the chosen experts only",
    "decode": "computes the whole gate in one launch",
    "prefill": "computes the whole gate in one launch, by larger tiles",
    "select": "selects from the logits of a matrix product",
}
_PURPOSE_IN_PIECES = (
    "computes the whole gate in launches of {piece} tokens, one after the other, since a matrix "
    "product would give other bits"
)


def plan_layer(manifest: Manifest, layer: LayerProblem, arch: str) -> LayerPlan:
    """Choose the steps of a layer on a GPU of `arch`; NoKernelError if a role has no kernel.

    Within a role, the kernel made for the fewest tokens serves them. A role is left where none of
    its kernels accepts the next number of tokens. An image row of a hash layer may choose any
    expert, out_logits has every one, and router_hash reads those of the table only: such calls take
    the whole gate. With same_bits, the last fused kernel serves all further tokens, in pieces.
    """
    copy_reason = _copy_reason(layer)
    problem = Problem(
        role="decode",
        layout=layer.layout if copy_reason is None else "kmajor",
        num_tokens=1,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        k=layer.k,
        same_bits=layer.same_bits,
        dtypes=layer.dtypes,
    )
    roles, gate_roles = _ROLES[layer.hashed], _ROLES[False]
    if not layer.same_bits:
        roles, gate_roles = (*roles, "select"), (*gate_roles, "select")
    steps = _steps_of_layer(manifest, problem, roles, arch)
    gate_steps: tuple[Step, ...] = ()
    if layer.hashed and layer.has_bias_vl:
        gate_steps = _steps_of_layer(manifest, problem, gate_roles, arch)
    return LayerPlan(steps=steps, gate_steps=gate_steps, copy_reason=copy_reason)


def _steps_of_layer(
    manifest: Manifest, problem: Problem, roles: tuple[str, ...], arch: str
) -> tuple[Step, ...]:
    """Return the steps that take any number of tokens by kernels of `roles`, in their order.

    Without a role that has no end, the last step is in pieces.
    """
    steps: list[Step] = []
    for role in roles:
        layout = None if role == "select" else problem.layout
        wanted = replace(problem, role=role, layout=layout)
        is_gap = role != "select" and steps and not _accepted(resolve(manifest, wanted, arch))
        if is_gap:
            # A gap hands over to the product; a set without decode kernels is no set for a layer.
            if role == "decode":
                select_kernel(manifest, replace(wanted, num_tokens=1), arch)
            continue
        if role == "prefill" and steps:
            steps += _stand_ins(manifest, wanted, arch)
        steps += _steps_of_role(manifest, wanted, arch)
        end = steps[-1].max_tokens
        if end is None:
            break
        problem = replace(problem, num_tokens=end + 1)
    end = steps[-1].max_tokens
    if end is not None and "select" not in roles:
        steps.append(_in_pieces(steps[-1].kernel, end, arch))
    elif end is not None:
        raise NoKernelError(
            f"no kernel for more than {end} tokens on {arch}; build them all with `{BUILD_COMMAND}`"
        )
    return tuple(steps)


def _stand_ins(manifest: Manifest, problem: Problem, arch: str) -> list[Step]:
    """Return the step of a kernel that takes as many tokens as the last step, by fewer clusters.

    No call takes it first. It is there for a GPU that does not hold all clusters of that step's
    launch at once. A decode launch of 512 experts has 8 clusters; an H200 holds 7.
    """
    tokens = problem.num_tokens - 1
    taken = _accepted(resolve(manifest, replace(problem, num_tokens=tokens), arch))
    same = [kernel for kernel in taken if kernel.most_tokens(problem.num_experts) == tokens]
    if not same:
        return []
    reason = f"..{tokens} tokens, if that takes fewer waves of clusters: {_PURPOSE[problem.role]}"
    return [Step(max_tokens=tokens, kernel=_least(same, problem), reason=reason)]


def _in_pieces(kernel: Kernel, most_tokens: int, arch: str) -> Step:
    """Return the step of more than most_tokens, those of one launch, by the same kernel."""
    tile = kernel.launch.token_tile
    piece = most_tokens // tile * tile
    if FIRST_TOKEN not in ABI[kernel.role] or piece == 0:
        raise NoKernelError(
            f"same_bits: expected a prefill kernel on {arch} for more than {most_tokens} tokens "
            f"(got {kernel.key}, of role {kernel.role}, for tiles of {tile}, as the last fused "
            f"one); build them all with `{BUILD_COMMAND}`, or leave same_bits out"
        )
    return Step(
        max_tokens=None,
        kernel=kernel,
        reason=f"{most_tokens + 1}.. tokens: {_PURPOSE_IN_PIECES.format(piece=piece)}",
        piece_tokens=piece,
    )


def without(plan: LayerPlan, unfit: Mapping[str, str]) -> LayerPlan:
    """Take kernels out of a plan, given by key with a reason each: the next step takes their place.

    NoKernelError if no step is left for the most tokens. It is how a plan follows a context that
    has no room for a kernel's cluster.
    """
    rejected = tuple(
        Rejected(kernel=kernel, reason=unfit[kernel.key])
        for kernel in plan.kernels
        if kernel.key in unfit
    )
    if any(steps and steps[-1].kernel.key in unfit for steps in (plan.steps, plan.gate_steps)):
        reasons = "".join(f"\n  {item.kernel.key}: {item.reason}" for item in rejected)
        raise NoKernelError(f"no kernel of this layer fits:{reasons}")
    return replace(
        plan,
        steps=tuple(step for step in plan.steps if step.kernel.key not in unfit),
        gate_steps=tuple(step for step in plan.gate_steps if step.kernel.key not in unfit),
        rejected=(*plan.rejected, *rejected),
    )


def _copy_reason(layer: LayerProblem) -> str | None:
    if not layer.tma_loadable:
        return "TMA cannot step by W_gate's rows, which are no multiple of 16 bytes"
    if layer.hashed and layer.layout != "kmajor":
        return "a hash layer reads an expert as one row of W_gate"
    return None


def _steps_of_role(manifest: Manifest, problem: Problem, arch: str) -> list[Step]:
    """Return the steps of one role from `problem.num_tokens` on; NoKernelError if there is none."""
    kernel = select_kernel(manifest, problem, arch)
    steps: list[Step] = []
    while True:
        high = kernel.most_tokens(problem.num_experts)
        if high is not None and high >= MAX_TOKENS:
            high = None
        reason = f"{problem.num_tokens}..{high or ''} tokens: {_PURPOSE[problem.role]}"
        steps.append(Step(max_tokens=high, kernel=kernel, reason=reason))
        if high is None:
            return steps
        # An accepted kernel takes `num_tokens`, so `high` is not below it: this ends.
        problem = replace(problem, num_tokens=high + 1)
        taken = _accepted(resolve(manifest, problem, arch))
        if not taken:
            return steps
        kernel = _least(taken, problem)


def select_kernel(manifest: Manifest, problem: Problem, arch: str) -> Kernel:
    """Return the accepted kernel made for the fewest tokens; NoKernelError lists every refusal."""
    candidates = resolve(manifest, problem, arch)
    accepted = _accepted(candidates)
    if not accepted:
        raise NoKernelError(_no_kernel_message(candidates, problem, arch))
    return _least(accepted, problem)


def _accepted(candidates: tuple[Accepted | Rejected, ...]) -> list[Kernel]:
    return [item.kernel for item in candidates if isinstance(item, Accepted)]


def _least(kernels: list[Kernel], problem: Problem) -> Kernel:
    """Return the kernel that is made for the fewest tokens, and not for a whole family of GPUs.

    Of equal ones it is that of the smaller token tile, which fills more of a GPU.
    """

    def rank(kernel: Kernel) -> tuple[int, bool, int]:
        most = kernel.most_tokens(problem.num_experts)
        tokens = MAX_TOKENS if most is None else min(most, MAX_TOKENS)
        return tokens, not kernel.arch.endswith("a"), kernel.launch.token_tile

    return min(kernels, key=rank)


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
