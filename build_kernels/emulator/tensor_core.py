"""Tensor cores: tcgen05.mma and its commits, wgmma, and their shared-memory descriptors.

Products of 16-bit floats are summed in float64 and rounded to float32 once for each instruction:
exact for integers of any order of summation; hardware's rounding order is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator import tensor_memory
from build_kernels.emulator.agents import Operation
from build_kernels.emulator.bulk_copy import target_barrier
from build_kernels.emulator.clocks import TENSOR, Clock, Ints
from build_kernels.emulator.collectives import aligned
from build_kernels.emulator.floats import bf16_to_f32
from build_kernels.emulator.memory import (
    POISON,
    SHARED_RANK_SHIFT,
    SHARED_RESERVED,
    VALID,
)
from build_kernels.emulator.operands import (
    Context,
    Modifiers,
    Source,
    address,
    items,
    registers_of,
    source,
)
from build_kernels.emulator.ptx import Address, Instruction, Register, Vector
from build_kernels.emulator.tensor_map import swizzle
from build_kernels.emulator.tensor_memory import COLUMNS, TensorAccess
from build_kernels.emulator.warp import (
    ALL,
    LANES,
    Mask,
    Move,
    Outcome,
    Pending,
    Wait,
    Warp,
    indices_of,
)

if TYPE_CHECKING:
    from build_kernels.emulator.barriers import Mbarrier
    from build_kernels.emulator.machine import Cta

Array = NDArray[Any]
Run = Callable[[Warp], Outcome]
K = 16  # elements of one kind::f16 or wgmma instruction
ROW, ATOM_ROWS, CHUNK = 16, 8, 8  # bytes of a core-matrix row; its rows; its elements of a row


@dataclass(frozen=True)
class SharedDescriptor:
    """A matrix in shared memory: byte offset, leading and stride byte offsets, swizzle span."""

    start: int
    leading: int
    stride: int
    span: int


def decode_shared(ins: Instruction, bits: int, blackwell: bool) -> SharedDescriptor:
    """PTX ISA 9.7.16.4.1 (tcgen05) and 9.7.15.5.1 (wgmma), "Matrix Descriptor"."""
    start = (bits & 0x3FFF) << 4
    leading = (bits >> 16 & 0x3FFF) << 4
    stride = (bits >> 32 & 0x3FFF) << 4
    if bits >> 49 & 7:
        raise ins.error(f"descriptor {bits:#018x}: a matrix base offset is not modelled")
    if blackwell:
        if bits >> 46 & 7 != 1:
            raise ins.error(f"descriptor {bits:#018x}: bits 46..48 must be 0b001")
        if bits >> 52 & 1:
            raise ins.error(f"descriptor {bits:#018x}: absolute leading offsets are not modelled")
        spans = {0: 0, 2: 128, 4: 64, 6: 32}
        mode = bits >> 61 & 7
    else:
        spans = {0: 0, 1: 128, 2: 64, 3: 32}
        mode = bits >> 62 & 3
    if mode not in spans:
        raise ins.error(f"descriptor {bits:#018x}: swizzle mode {mode} is not modelled")
    return SharedDescriptor(start, leading, stride, spans[mode])


@lru_cache(maxsize=256)
def _canonical(rows: int, leading: int, stride: int, span: int, mn_major: bool) -> Ints:
    """[rows, K] byte offsets of 2-byte elements before swizzling: the canonical layouts.

    T is a row of 16 bytes; CuTe writes these layouts in mma_traits_sm90_gmma.hpp."""
    r, k = np.meshgrid(np.arange(rows), np.arange(K), indexing="ij")
    if not mn_major:
        if span == 0:
            return (
                r % ATOM_ROWS * ROW + r // ATOM_ROWS * stride + k // CHUNK * leading + k % CHUNK * 2
            )
        return r % ATOM_ROWS * span + r // ATOM_ROWS * stride + k * 2
    if span == 0:
        return r % CHUNK * 2 + r // CHUNK * stride + k % ATOM_ROWS * ROW + k // ATOM_ROWS * leading
    width = span // 2
    return r % width * 2 + r // width * leading + k % ATOM_ROWS * span + k // ATOM_ROWS * stride


def matrix_offsets(descriptor: SharedDescriptor, rows: int, mn_major: bool) -> Ints:
    """[rows, K] byte offset of each element in the CTA's shared memory."""
    table = _canonical(
        rows, descriptor.leading, descriptor.stride, descriptor.span, mn_major
    )
    return swizzle(descriptor.start + table, descriptor.span)


def read_matrix(
    operation: Operation, cta: Cta, offsets: Ints, bf16: bool
) -> tuple[Array, NDArray[np.bool_]]:
    """Elements as float64 [rows, K] and which of them are poison."""
    memory = cta.shared
    touched = np.stack([offsets, offsets + 1], axis=-1).reshape(-1)
    low, high = int(touched.min()), int(touched.max())
    if low < SHARED_RESERVED or high >= cta.shared_end:
        operation.machine.report(
            "out-of-bounds",
            f"{operation.what} reads outside the CTA's shared memory "
            f"({SHARED_RESERVED:#x}..{cta.shared_end:#x})",
            operation=operation,
            address=memory.describe(low if low < SHARED_RESERVED else high),
        )
        return np.full(offsets.shape, np.nan), np.ones(offsets.shape, dtype=bool)
    memory.note_read(touched, operation)
    raw = memory.data[touched].view(np.uint16).reshape(offsets.shape)
    poison = (memory.state[touched] != VALID).reshape(*offsets.shape, 2).any(axis=-1)
    return decode_halves(raw, bf16), poison


def _rows(poison: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which rows hold poison anywhere."""
    found: NDArray[np.bool_] = np.logical_or.reduce(poison, axis=1)
    return found


def decode_halves(raw: Array, bf16: bool) -> Array:
    values = bf16_to_f32(raw) if bf16 else raw.view(np.float16)
    return values.astype(np.float64)


# ---- tcgen05.mma ----


@dataclass(frozen=True)
class InstructionDescriptor:
    """PTX ISA 9.7.16.4.2, "Instruction descriptor", of kind::f16."""

    m: int
    n: int
    a_bf16: bool
    b_bf16: bool
    a_negated: bool
    b_negated: bool
    a_mn_major: bool
    b_mn_major: bool


def decode_instruction(ins: Instruction, bits: int, group: int) -> InstructionDescriptor:
    m, n = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
    if bits & 0b1111 or bits >> 6 & 1 or bits >> 23 & 1 or bits >> 29:
        raise ins.error(f"instruction descriptor {bits:#010x}: sparsity, saturation, .ws shifts "
                        "and reserved bits are not modelled")  # fmt: skip
    if bits >> 4 & 3 != 1:
        raise ins.error(f"instruction descriptor {bits:#010x}: D must be F32")
    a, b = bits >> 7 & 7, bits >> 10 & 7
    if a > 1 or b > 1:
        raise ins.error(f"instruction descriptor {bits:#010x}: A and B must be F16 or BF16")
    sizes = (64, 128) if group == 1 else (128, 256)
    step = {(1, 64): 8, (1, 128): 16, (2, 128): 16, (2, 256): 16}.get((group, m))
    if m not in sizes or step is None or not step <= n <= 256 or n % step:
        raise ins.error(f"instruction descriptor {bits:#010x}: no shape M={m}, N={n}")
    return InstructionDescriptor(
        m, n, bool(a), bool(b), bool(bits >> 13 & 1), bool(bits >> 14 & 1),
        bool(bits >> 15 & 1), bool(bits >> 16 & 1),
    )  # fmt: skip


def accumulator_cells(m: int, n: int, group: int, lane: int, column: int) -> Ints:
    """[rows of one CTA, n] TMEM cells of D.

    One CTA: M=128 row r in lane r; M=64 row r in lane 32 (r/16) + r mod 16, from lane 0 or 16.
    Two CTAs: M=256 as M=128 in each; M=128 has 64 rows each, the upper half of the columns in
    lanes 64.. (PTX ISA 9.7.16.10.5, "Data path layout organization")."""
    rows = m // group
    r, c = np.meshgrid(np.arange(rows), np.arange(n), indexing="ij")
    if group == 2 and m == 128:
        return (lane + r + 64 * (c // (n // 2))) * COLUMNS + column + c % (n // 2)
    if rows == 64:
        r = r // 16 * 32 + r % 16
    return (lane + r) * COLUMNS + column + c


class TensorMma(Operation):
    """tcgen05.mma of kind::f16 with A and B in shared memory."""

    what = "tcgen05.mma"

    def __init__(
        self,
        warp: Warp,
        lane: int,
        shape: InstructionDescriptor,
        a: SharedDescriptor,
        b: SharedDescriptor,
        ctas: Sequence[Cta],
        where: int,
        accumulate: bool,
        disabled: Array | None,
    ) -> None:
        super().__init__(warp, lane, pipe=0)
        self.shape = shape
        self.a, self.b = a, b
        self.ctas = ctas
        self.accumulate = accumulate
        self.disabled = disabled
        self.tensor = warp.tensor
        self.cells = accumulator_cells(
            shape.m, shape.n, len(ctas), where >> 16, where & 0xFFFF
        )
        for cta in ctas:
            cta.incoming.append(self)

    def perform(self) -> None:
        shape, share = self.shape, len(self.ctas)
        b_offsets = matrix_offsets(self.b, shape.n // share, shape.b_mn_major)
        halves = [read_matrix(self, cta, b_offsets, shape.b_bf16) for cta in self.ctas]
        b = np.concatenate([values for values, _ in halves])
        b_poison = np.concatenate([poison for _, poison in halves])
        if shape.a_negated != shape.b_negated:
            b = -b
        a_offsets = matrix_offsets(self.a, shape.m // share, shape.a_mn_major)
        for number, cta in enumerate(self.ctas):
            a, a_poison = read_matrix(self, cta, a_offsets, shape.a_bf16)
            product = a @ b.T
            poison = np.logical_or.outer(_rows(a_poison), _rows(b_poison))
            self._accumulate(cta, number, product, poison)

    def _accumulate(self, cta: Cta, number: int, product: Array, poison: Array) -> None:
        memory = cta.tensor_memory
        cells = self.cells
        keep = np.ones(cells.shape, dtype=bool)
        if self.disabled is not None:
            keep = ~self.disabled[number][cells // COLUMNS]
        flat = cells[keep]
        memory.inside(self, flat)
        access = TensorAccess(self, self.tensor)
        if self.accumulate:
            before = memory.cells.values[flat].view(np.float32).astype(np.float64)
            total = product[keep] + before
            bad = poison[keep] | (memory.cells.state[flat] == POISON)
        else:
            total, bad = product[keep], poison[keep]
        memory.cells.note_write(flat, access)
        memory.cells.values[flat] = total.astype(np.float32).view(np.uint32)
        memory.cells.state[flat] = np.where(bad, POISON, VALID)


def mma(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=2)
    group = int(mods.need("cta_group::1", "cta_group::2")[-1])
    mods.need("kind::f16")
    mods.take("collector::a::discard")
    mods.done()
    operands = list(ins.operands)
    if isinstance(operands[1], Address):
        raise ins.error("A in tensor memory is not supported")
    target = address(ins, operands[0], context)
    a, b = (source(ins, each, "b64", context) for each in operands[1:3])
    descriptor = source(ins, operands[3], "b32", context)
    rest = operands[4:]
    mask: list[Source] = []
    if rest and isinstance(rest[0], Vector):
        mask = [source(ins, each, "b32", context) for each in items(rest.pop(0))]
        if len(mask) != 4 * group:
            raise ins.error(f"needs {4 * group} registers of disabled lanes (got {len(mask)})")
    if len(rest) != 1:
        raise ins.error("a scale of the accumulator is not supported")
    enable = source(ins, rest[0], "pred", context)
    used = registers_of((target, a, b, descriptor, enable, *mask))

    def run(w: Warp) -> None:
        w.poisoned("an operand of tcgen05.mma", used)
        ctas = _pair(w, group)
        for lane in (int(lane) for lane in indices_of(w.bits)):
            where = int(target.get(w)[lane])
            shape = decode_instruction(ins, int(descriptor.get(w)[lane]), group)
            base, column = where >> 16 & 0xFFFF, where & 0xFFFF
            width = shape.n // 2 if (group, shape.m) == (2, 128) else shape.n
            allowed = (0, 16) if (group, shape.m) == (1, 64) else (0,)
            if base not in allowed or column + width > COLUMNS:
                w.machine.report(
                    "out-of-bounds",
                    f"an accumulator of M={shape.m}, N={shape.n} does not fit here",
                    warp=w,
                    lane=lane,
                    address=f"tensor memory {where:#010x}",
                )
                continue
            disabled = None
            if mask:
                words = np.array([m.get(w)[lane] for m in mask], dtype=np.uint32)
                if words.any():
                    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
                    disabled = bits.astype(bool).reshape(group, 128)
            operation = TensorMma(
                w, lane, shape,
                decode_shared(ins, int(a.get(w)[lane]), True),
                decode_shared(ins, int(b.get(w)[lane]), True),
                ctas, where, bool(enable.get(w)[lane]), disabled,
            )  # fmt: skip
            w.machine.issue(operation)

    return run


def _pair(w: Warp, group: int) -> list[Cta]:
    """The CTAs of an operation: this one, or the pair (PTX ISA 9.7.16.5, "CTA pair")."""
    if group == 1:
        return [w.cta]
    peers = w.cta.cluster.ctas
    even = w.cta.rank & ~1
    if even + 1 >= len(peers):
        w.machine.report("out-of-bounds", "cta_group::2 needs a pair of CTAs", warp=w)
        return [w.cta]
    return [peers[even], peers[even + 1]]


class TensorCommit(Operation):
    """tcgen05.commit: arrives when all earlier tcgen05 operations of the thread are complete.

    It implies tcgen05.fence::before_thread_sync (PTX ISA 9.7.16.12, "tcgen05.commit")."""

    what = "tcgen05.commit"

    def __init__(self, warp: Warp, lane: int, barriers: Sequence[Mbarrier]) -> None:
        super().__init__(warp, lane, pipe=0)
        self.barriers = barriers

    def completion(self) -> Clock:
        clock = super().completion()
        clock[TENSOR, self.slot.actor] = self.tick
        return clock

    def perform(self) -> None:
        clock = self.completion()
        for barrier in self.barriers:
            if barrier.cta is not self.cta:
                barrier.foreign_touches.append((self.slot.actor, self.tick, self.instruction))
            if barrier.cta.exited:
                self.machine.report(
                    "exited-peer",
                    "tcgen05.commit arrives on an mbarrier of a CTA that has exited",
                    operation=self,
                    address=barrier.describe(),
                )
            barrier.arrive(1, clock, operation=self)


def commit(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=2)
    group = int(mods.need("cta_group::1", "cta_group::2")[-1])
    mods.need("mbarrier::arrive::one")
    mods.one_of("shared::cluster")
    multicast = mods.take("multicast::cluster")
    mods.need("b64")
    mods.done()
    where = address(ins, ins.operands[0], context)
    mask = source(ins, ins.operands[1], "u16", context) if multicast else None
    if len(ins.operands) != 1 + multicast:
        raise ins.error("has the wrong number of operands")

    def run(w: Warp) -> None:
        w.poisoned("an operand of tcgen05.commit", where.registers)
        _pair(w, group)
        for lane in (int(lane) for lane in indices_of(w.bits)):
            at = int(where.get(w)[lane]) & 0xFFFFFFFF
            places = [at]
            if mask is not None:
                low = at & ((1 << SHARED_RANK_SHIFT) - 1)
                ranks = int(mask.get(w)[lane])
                places = [r << SHARED_RANK_SHIFT | low for r in range(16) if ranks >> r & 1]
            found = [target_barrier(w, lane, place, proxied=True) for place in places]
            barriers = [barrier for barrier in found if barrier is not None]
            w.machine.issue(TensorCommit(w, lane, barriers))

    return run


def tcgen05(ins: Instruction, context: Context) -> Run:
    """Everything that starts with tcgen05."""
    name = ins.words[1] if len(ins.words) > 1 else ""
    table = {**tensor_memory.INSTRUCTIONS, "mma": mma, "commit": commit}
    if name not in table:
        raise ins.error(f"tcgen05.{name} is not supported")
    if not context.arch.startswith("sm_10"):
        raise ins.error(f"tcgen05 does not exist on {context.arch}")
    return table[name](ins, context)


# ---- wgmma ----


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
        self.cta.incoming.append(self)

    def perform(self) -> None:
        warp = self.warp
        b, b_poison = read_matrix(
            self, self.cta, matrix_offsets(self.b, self.n, self.majors[1]), self.bf16
        )
        quarter = warp.index % 4 * 16
        if isinstance(self.a, SharedDescriptor):
            offsets = matrix_offsets(self.a, 64, self.majors[0])[quarter : quarter + 16]
            a, a_poison = read_matrix(self, self.cta, offsets, self.bf16)
            bad_rows = _rows(a_poison)
        else:
            a = decode_halves(self.a, self.bf16)
            bad_rows = np.zeros(16, dtype=bool)
            if self.a_poison is not None:
                # Lane t holds rows t/4 and t/4 + 8.
                rows = self.a_poison.reshape(8, 4).any(axis=1)
                bad_rows = np.concatenate([rows, rows])
        product = self.sign * (a @ b.T)
        poison = np.logical_or.outer(bad_rows, _rows(b_poison))
        lane = np.arange(LANES)
        for i, (register, pending, before) in enumerate(self.targets):
            row = lane // 4 + 8 * (i // 2 % 2)
            column = 8 * (i // 4) + 2 * (lane % 4) + i % 2
            total, bad = product[row, column], poison[row, column]
            if self.accumulate:
                total = total + warp.r[register].view(np.float32).astype(np.float64)
                taint = before.taint if isinstance(before, Pending) else before
                bad = bad | taint if taint is not None else bad
            pending.taint = bad if bad.any() else None
            warp.r[register] = total.astype(np.float32).view(np.uint32)
            warp.groups["wgmma written"][register] = warp.r[register]

    def waited(self) -> None:
        for register, pending, _ in self.targets:
            if self.warp.t[register] is pending:
                self.warp.t[register] = pending.taint


    def settle(self) -> None:
        """Go on as if it had been waited for, after a finding that it was not."""
        self.finish()
        self.waited()
        self.warp.learn(ALL, self.slot.actor, self.tick)


_WAIT = "wgmma.wait_group"


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
        source(ins, each, "b32" if in_registers else "b64", context)
        for each in items(operands[1])
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
    """A [16, 16] of raw halves from 4 registers (PTX ISA 9.7.15.5.1.1, "Register fragments")."""
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
            return Wait(f"{len(left)} wgmma.mma_async", (left[-1].signal,))
        for operation in operations:
            operation.waited()
            w.learn(w.bits, operation.slot.actor, operation.tick)
        w.groups["wgmma groups"] = groups[len(over) :]
        return None

    return run


DECODERS: dict[str, Callable[[Instruction, Context], Run]] = {"tcgen05": tcgen05, "wgmma": wgmma}
