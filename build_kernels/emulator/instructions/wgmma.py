"""wgmma: the warpgroup multiplies, one warp's quarter at a time.

PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". See tensor_core for the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from build_kernels.binaries.ptx.syntax import Register, Vector
from build_kernels.emulator.execution.interruption import Interruption, Wait
from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.registers import Move, Pending, Taint
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions import matrix
from build_kernels.emulator.instructions.convergence import aligned
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, items, registers_of
from build_kernels.emulator.lanes import ALL, LANES, Array, Mask
from build_kernels.emulator.numerics import tensor_core

_WAIT = "wgmma.wait_group"


class Shape(NamedTuple):
    """The literal part of an instruction: N, the type, which of A and B are MN-major, the sign."""

    n: int
    bf16: bool
    a_mn_major: bool
    b_mn_major: bool
    sign: int


class Fragment(NamedTuple):
    """A in registers: raw halves [16, K], and poison per lane."""

    halves: Array
    poison: Mask | None


class WarpgroupMma(Operation):
    """One warp's quarter of a wgmma.mma_async: rows 16 (w mod 4) .. + 15 of 64."""

    what = "wgmma.mma_async"
    guarded = False

    def __init__(
        self,
        warp: Warp,
        shape: Shape,
        a: matrix.SharedDescriptor | Fragment,
        b: matrix.SharedDescriptor,
        accumulate: bool,
        targets: Sequence[int],
    ) -> None:
        super().__init__(warp, warp.first_lane(), pipe=1 + warp.index)
        self.shape = shape
        self.a, self.b = a, b
        self.accumulate = accumulate
        self.moves: list[Move] = []
        self.targets: list[tuple[int, Pending, Taint]] = []
        for register in targets:
            before = warp.t[register]
            if isinstance(before, Pending) and before.what != _WAIT:
                before = warp.unwaited(register, before)
            pending = Pending(_WAIT, self)
            self.targets.append((register, pending, before))
            warp.t[register] = pending
        self.touches(self.cta)

    def perform(self) -> None:
        warp, shape = self.warp, self.shape
        b_layout = matrix.layout_of(self.b, shape.n, shape.b_mn_major)
        b, b_poison = matrix.read(self, self.cta, b_layout, shape.bf16)  # [n, K]
        a, bad_rows = self._quarter_of_a()  # [16, K], [16]
        poison = np.logical_or.outer(bad_rows, matrix.rows_of(b_poison))
        rows, columns = _fragment_of_d(shape.n)
        bad = poison[rows, columns]  # [n / 2, 32]
        before = np.zeros((16, shape.n), np.float32)
        if self.accumulate:
            old = np.stack([warp.r[register] for register, _, _ in self.targets])
            before[rows, columns] = old.view(np.float32)
            for i, (_, _, state) in enumerate(self.targets):
                taint = state.taint if isinstance(state, Pending) else state
                if taint is not None:
                    bad[i] |= taint
        kinds = (shape.bf16, shape.bf16)
        after = tensor_core.multiply_add(shape.sign * a, b, before, kinds)
        values = after[rows, columns].view(np.uint32)
        poisoned = matrix.rows_of(bad)
        written = warp.groups["wgmma written"]
        for i, (register, pending, _) in enumerate(self.targets):
            pending.taint = bad[i] if poisoned[i] else None
            warp.r[register] = written[register] = values[i]
        # The states before are of no more use, and would keep every earlier wgmma alive.
        self.targets = [(register, pending, None) for register, pending, _ in self.targets]

    def _quarter_of_a(self) -> tuple[Array, Mask]:
        """Return the warp's 16 rows of A, and which of them hold poison."""
        if isinstance(self.a, matrix.SharedDescriptor):
            quarter = self.warp.index % 4 * 16
            layout = matrix.layout_of(self.a, 64, self.shape.a_mn_major, quarter, quarter + 16)
            a, poison = matrix.read(self, self.cta, layout, self.shape.bf16)
            return a, matrix.rows_of(poison)
        bad_rows = np.zeros(16, dtype=bool)
        if self.a.poison is not None:
            # Lane t holds rows t/4 and t/4 + 8.
            bad_rows = np.tile(self.a.poison.reshape(8, 4).any(axis=1), 2)
        return matrix.decode_halves(self.a.halves, self.shape.bf16), bad_rows

    def waited(self) -> None:
        self.warp.hand_over(self.targets)
        # The pending registers refer to the operation: a cycle that only the collector would free.
        self.targets = []

    def settle(self) -> None:
        """Finish as if it had been waited for, to go on after the finding that it was not."""
        self.grid.perform(self)
        self.waited()
        self.warp.order_after(ALL, self.slot.actor, self.tick)


@lru_cache(maxsize=32)
def _fragment_of_d(n: int) -> tuple[Array, Array]:
    """Return row and column of D in each accumulator register's lanes: [n / 2, 32] each."""
    lane, i = np.arange(LANES), np.arange(n // 2)[:, None]
    rows = lane // 4 + 8 * (i // 2 % 2)
    columns = 8 * (i // 4) + 2 * (lane % 4) + i % 2
    return np.broadcast_to(rows, columns.shape), columns


def mma_async(d: Decoding) -> Run:
    n, kind = _types(d)
    operands = d.operands
    targets = [each.index for each in items(operands[0]) if isinstance(each, Register)]
    if len(targets) != n // 2:
        raise d.error(f"needs {n // 2} accumulator registers (got {len(targets)})")
    in_registers = isinstance(operands[1], Vector)
    a_kind = "b32" if in_registers else "b64"
    a = [d.source(each, a_kind) for each in items(operands[1])]
    if in_registers and len(a) != 4:
        raise d.error("A in registers takes 4 of them")
    b = d.source(operands[2], "b64")
    enable = d.source(operands[3], "pred")
    flags = [d.source(each, "s32").constant for each in operands[4:]]
    if len(flags) != (3 if in_registers else 4) or any(not isinstance(f, int) for f in flags):
        raise d.error("needs literal scales and transposes")
    signs = (int(flags[0] or 0), int(flags[1] or 0))
    if any(sign not in (1, -1) for sign in signs):
        raise d.error("scales of A and B are 1 or -1")
    if any(flag not in (0, 1) for flag in flags[2:]):
        raise d.error("transposes of A and B are 0 or 1")
    a_mn_major = not in_registers and bool(flags[2])
    shape = Shape(n, kind == "bf16", a_mn_major, bool(flags[-1]), signs[0] * signs[1])
    inputs = registers_of(a) if in_registers else ()

    def run(w: Warp) -> None:
        w.poisoned("an operand of wgmma", registers_of((b, enable)))
        _check_fenced(w, [*targets, *inputs])
        lane = w.first_lane()
        a_matrix: matrix.SharedDescriptor | Fragment
        if in_registers:
            poison = w.taint(inputs)
            a_matrix = Fragment(_fragment_of_a([s.get(w) for s in a]), poison)
        else:
            w.poisoned("an operand of wgmma", a[0].registers)
            a_matrix = matrix.decode_shared(d, int(a[0].get(w)[lane]), False)
        b_matrix = matrix.decode_shared(d, int(b.get(w)[lane]), False)
        accumulate = bool(enable.get(w)[lane])
        operation = WarpgroupMma(w, shape, a_matrix, b_matrix, accumulate, targets)
        w.groups.setdefault("wgmma open", []).append(operation)
        w.grid.issue(operation)

    return aligned(d, run)


def _types(d: Decoding) -> tuple[int, str]:
    n = int(d.need(*(f"m64n{8 * i}k16" for i in range(1, 33)))[4:-3])
    kind = d.type()
    if d.type() != kind or kind not in ("f16", "bf16"):
        raise d.error("A and B must both be .f16 or both .bf16")
    d.need("f32")
    return n, kind


def _fragment_of_a(registers: Sequence[Array]) -> Array:
    """Return A [16, K] of raw halves from 4 registers (PTX ISA, "Register fragments")."""
    lane = np.arange(LANES)
    halves = np.zeros((16, matrix.K), dtype=np.uint16)
    for i, values in enumerate(registers):
        row = lane // 4 + 8 * (i % 2)
        column = lane % 4 * 2 + 8 * (i // 2)
        halves[row, column] = values & np.uint32(0xFFFF)
        halves[row, column + 1] = values >> np.uint32(16)
    return halves


def _check_fenced(w: Warp, registers: Sequence[int]) -> None:
    """Report a register that another instruction wrote since the last wgmma.fence."""
    fenced = w.groups.get("wgmma fenced")
    written = w.groups.setdefault("wgmma written", {})
    for register in registers:
        if fenced is not None and fenced[register] is w.r[register]:
            continue
        if fenced is None or written.get(register) is not w.r[register]:
            name = w.grid.kernel.registers[register].name
            w.report(
                "missing-wgmma-fence",
                f"{name} was written since the last wgmma.fence"
                if fenced is not None
                else "no wgmma.fence came before the first wgmma.mma_async",
                by_the_letter=fenced is not None and register in w.grid.kernel.moved_accumulators,
            )


def fence(w: Warp) -> None:
    """Order writes of registers before later wgmma."""
    w.groups["wgmma fenced"] = list(w.r)


def commit_group(w: Warp) -> None:
    w.groups.setdefault("wgmma groups", []).append(w.groups.pop("wgmma open", []))


def wait_group(d: Decoding) -> Run:
    count = d.source(d.operands[0], "u32").constant
    if not isinstance(count, int) or not 0 <= count <= 7:
        raise d.error("needs a literal count from 0 to 7")

    def run(w: Warp) -> Interruption:
        groups = w.groups.setdefault("wgmma groups", [])
        over = groups[: max(len(groups) - count, 0)]
        operations = [operation for group in over for operation in group]
        left = [operation for operation in operations if not operation.done]
        if left:
            return Wait(lambda: f"{len(left)} wgmma.mma_async", (left[-1].signal,))
        for operation in operations:
            operation.waited()
            w.order_after(w.bits, operation.slot.actor, operation.tick)
        w.groups["wgmma groups"] = groups[len(over) :]
        return None

    return aligned(d, run)


INSTRUCTIONS: dict[str, Decoder] = {
    "wgmma.mma_async": mma_async,
    "wgmma.fence": lambda d: aligned(d, fence),
    "wgmma.commit_group": lambda d: aligned(d, commit_group),
    "wgmma.wait_group": wait_group,
}
