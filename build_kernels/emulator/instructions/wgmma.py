"""wgmma: the warpgroup multiplies, one warp's quarter at a time.

PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".

Rounding is as in tensor_core.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import (
    ALL,
    LANES,
    Array,
    Mask,
    Move,
    Outcome,
    Pending,
    Run,
    Wait,
    Warp,
)
from build_kernels.emulator.instructions.collectives import aligned
from build_kernels.emulator.instructions.matrices import (
    K,
    SharedDescriptor,
    decode_halves,
    decode_shared,
    matrix_offsets,
    read_matrix,
    rows_of,
)
from build_kernels.emulator.instructions.operands import (
    Context,
    Modifiers,
    items,
    registers_of,
    source,
)
from build_kernels.emulator.ptx.syntax import Instruction, Register, Vector


class WarpgroupMma(Operation):
    """One warp's quarter of a wgmma.mma_async: rows 16 (w mod 4) .. + 15 of 64."""

    what = "wgmma.mma_async"

    def __init__(
        self,
        warp: Warp,
        n: int,
        a: SharedDescriptor | Array,
        a_poison: Mask | None,
        b: SharedDescriptor,
        majors: tuple[bool, bool],
        bf16: bool,
        signs: tuple[int, int],
        accumulate: bool,
        targets: Sequence[int],
    ) -> None:
        super().__init__(warp, warp.first_lane(), pipe=1 + warp.index)
        self.a, self.b = a, b
        self.a_poison = a_poison
        self.n = n
        self.majors = majors
        self.bf16 = bf16
        self.sign = signs[0] * signs[1]
        self.accumulate = accumulate
        self.moves: list[Move] = []
        self.targets: list[tuple[int, Pending, Any]] = []
        for register in targets:
            before = warp.t[register]
            if isinstance(before, Pending) and before.what != _WAIT:
                before = warp.unwaited(register, before)
            pending = Pending(_WAIT, self)
            self.targets.append((register, pending, before))
            warp.t[register] = pending
        self.touches(self.cta)

    def perform(self) -> None:
        warp = self.warp
        b, b_poison = read_matrix(
            self, self.cta, matrix_offsets(self.b, self.n, self.majors[1]), self.bf16
        )
        quarter = warp.index % 4 * 16
        if isinstance(self.a, SharedDescriptor):
            offsets = matrix_offsets(self.a, 64, self.majors[0])[quarter : quarter + 16]
            a, a_poison = read_matrix(self, self.cta, offsets, self.bf16)
            bad_rows = rows_of(a_poison)
        else:
            a = decode_halves(self.a, self.bf16)
            bad_rows = np.zeros(16, dtype=bool)
            if self.a_poison is not None:
                # Lane t holds rows t/4 and t/4 + 8.
                rows = self.a_poison.reshape(8, 4).any(axis=1)
                bad_rows = np.concatenate([rows, rows])
        product = self.sign * (a @ b.T)
        poison = np.logical_or.outer(bad_rows, rows_of(b_poison))
        rows, columns = _fragment_of_d(self.n)
        totals, bad = product[rows, columns], poison[rows, columns]
        if self.accumulate:
            old = np.stack([warp.r[register] for register, _, _ in self.targets])
            totals = totals + old.view(np.float32).astype(np.float64)
            for i, (_, _, before) in enumerate(self.targets):
                taint = before.taint if isinstance(before, Pending) else before
                if taint is not None:
                    bad[i] |= taint
        values = totals.astype(np.float32).view(np.uint32)
        poisoned = rows_of(bad)
        written = warp.groups["wgmma written"]
        for i, (register, pending, _) in enumerate(self.targets):
            pending.taint = bad[i] if poisoned[i] else None
            warp.r[register] = written[register] = values[i]
        # What was there before is of no more use, and would keep every earlier wgmma alive.
        self.targets = [(register, pending, None) for register, pending, _ in self.targets]

    def waited(self) -> None:
        for register, pending, _ in self.targets:
            if self.warp.t[register] is pending:
                self.warp.t[register] = pending.taint
        # The pending registers know their operation: without this, only the collector frees both.
        self.targets = []

    def settle(self) -> None:
        """Go on as if it had been waited for, after a finding that it was not."""
        self.finish()
        self.waited()
        self.warp.learn(ALL, self.slot.actor, self.tick)


_WAIT = "wgmma.wait_group"


@lru_cache(maxsize=32)
def _fragment_of_d(n: int) -> tuple[Array, Array]:
    """Row and column of D in each accumulator register's lanes: [n / 2, 32] each."""
    lane, i = np.arange(LANES), np.arange(n // 2)[:, None]
    rows = lane // 4 + 8 * (i // 2 % 2)
    columns = 8 * (i // 4) + 2 * (lane % 4) + i % 2
    return np.broadcast_to(rows, columns.shape), columns


def wgmma(ins: Instruction, context: Context) -> Run:
    name = ins.words[1] if len(ins.words) > 1 else ""
    if context.arch != "sm_90a":
        raise ins.error(f"wgmma does not exist on {context.arch}")
    if name == "fence":
        return _wgmma_fence(ins)
    if name == "commit_group":
        return _wgmma_commit(ins)
    if name == "wait_group":
        return _wgmma_wait(ins, context)
    if name == "mma_async":
        return _wgmma_mma(ins, context)
    raise ins.error(f"wgmma.{name} is not supported")


def _sync_aligned(ins: Instruction) -> None:
    mods = Modifiers(ins, skip=2)
    mods.need("sync")
    mods.need("aligned")
    mods.done()


def _wgmma_mma(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=2)
    mods.need("sync")
    mods.need("aligned")
    n = int(mods.need(*(f"m64n{8 * i}k16" for i in range(1, 33)))[4:-3])
    kind = mods.type()
    if mods.type() != kind or kind not in ("f16", "bf16"):
        raise ins.error("A and B must both be .f16 or both .bf16")
    mods.need("f32")
    mods.done()
    operands = list(ins.operands)
    targets = [each.index for each in items(operands[0]) if isinstance(each, Register)]
    if len(targets) != n // 2:
        raise ins.error(f"needs {n // 2} accumulator registers (got {len(targets)})")
    in_registers = isinstance(operands[1], Vector)
    a = [
        source(ins, each, "b32" if in_registers else "b64", context) for each in items(operands[1])
    ]
    if in_registers and len(a) != 4:
        raise ins.error("A in registers takes 4 of them")
    b = source(ins, operands[2], "b64", context)
    scale = operands[3]
    enable = source(ins, scale, "pred", context)
    flags = [source(ins, each, "s32", context).constant for each in operands[4:]]
    if len(flags) != (3 if in_registers else 4) or any(not isinstance(f, int) for f in flags):
        raise ins.error("needs literal scales and transposes")
    signs = (int(flags[0] or 0), int(flags[1] or 0))
    if any(sign not in (1, -1) for sign in signs):
        raise ins.error("scales of A and B are 1 or -1")
    majors = (False if in_registers else bool(flags[2]), bool(flags[-1]))
    inputs = [register for s in a for register in s.registers] if in_registers else []

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        w.poisoned("an operand of wgmma", registers_of((b, enable)))
        _check_fenced(w, [*targets, *inputs])
        lane = w.first_lane()
        matrix: SharedDescriptor | Array
        poison = None
        if in_registers:
            poison = w.taint(inputs)
            matrix = _fragment([s.get(w) for s in a])
        else:
            w.poisoned("an operand of wgmma", a[0].registers)
            matrix = decode_shared(ins, int(a[0].get(w)[lane]), False)
        operation = WarpgroupMma(
            w, n, matrix, poison, decode_shared(ins, int(b.get(w)[lane]), False), majors,
            kind == "bf16", signs, bool(enable.get(w)[lane]), targets,
        )  # fmt: skip
        w.groups.setdefault("wgmma open", []).append(operation)
        w.machine.issue(operation)
        return None

    return run


def _fragment(registers: Sequence[Array]) -> Array:
    """A [16, 16] of raw halves from 4 registers (PTX ISA, "Register fragments")."""
    lane = np.arange(LANES)
    matrix = np.zeros((16, K), dtype=np.uint16)
    for i, values in enumerate(registers):
        row = lane // 4 + 8 * (i % 2)
        column = lane % 4 * 2 + 8 * (i // 2)
        matrix[row, column] = values & np.uint32(0xFFFF)
        matrix[row, column + 1] = values >> np.uint32(16)
    return matrix


def _check_fenced(w: Warp, registers: Sequence[int]) -> None:
    """Registers that other instructions wrote are seen by wgmma behind a wgmma.fence only."""
    fenced = w.groups.get("wgmma fenced")
    written = w.groups.setdefault("wgmma written", {})
    for register in registers:
        if fenced is not None and fenced[register] is w.r[register]:
            continue
        if fenced is None or written.get(register) is not w.r[register]:
            name = w.machine.kernel.registers[register].name
            w.machine.report(
                "missing-wgmma-fence",
                f"{name} was written since the last wgmma.fence"
                if fenced is not None
                else "no wgmma.fence came before the first wgmma.mma_async",
                warp=w,
            )
            return


def _wgmma_fence(ins: Instruction) -> Run:
    _sync_aligned(ins)

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        w.groups["wgmma fenced"] = list(w.r)
        return None

    return run


def _wgmma_commit(ins: Instruction) -> Run:
    _sync_aligned(ins)

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        w.groups.setdefault("wgmma groups", []).append(w.groups.pop("wgmma open", []))
        return None

    return run


def _wgmma_wait(ins: Instruction, context: Context) -> Run:
    _sync_aligned(ins)
    count = source(ins, ins.operands[0], "u32", context).constant
    if not isinstance(count, int):
        raise ins.error("needs a literal count")

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        groups = w.groups.setdefault("wgmma groups", [])
        over = groups[: max(len(groups) - count, 0)]
        operations = [operation for group in over for operation in group]
        left = [operation for operation in operations if not operation.done]
        if left:
            return Wait(lambda: f"{len(left)} wgmma.mma_async", (left[-1].signal,))
        for operation in operations:
            operation.waited()
            w.learn(w.bits, operation.slot.actor, operation.tick)
        w.groups["wgmma groups"] = groups[len(over) :]
        return None

    return run
