"""Matrices of the tensor cores: descriptors, canonical layouts, accumulators."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.instructions.decoding import Decoding
from build_kernels.emulator.lanes import Array, Ints, Mask
from build_kernels.emulator.launch.tensor_map import swizzle
from build_kernels.emulator.memory.memory import VALID
from build_kernels.emulator.memory.tensor_memory import COLUMNS
from build_kernels.emulator.memory.windows import SHARED_RESERVED
from build_kernels.emulator.numerics import floats

K = 16  # elements of one kind::f16 or wgmma instruction

ROW, ATOM_ROWS, CHUNK = 16, 8, 8  # bytes of a core-matrix row; its rows; its elements of a row


@dataclass(frozen=True)
class SharedDescriptor:
    """A matrix in shared memory: byte offset, leading and stride byte offsets, swizzle span."""

    start: int
    leading: int
    stride: int
    span: int


def decode_shared(d: Decoding, bits: int, blackwell: bool) -> SharedDescriptor:
    """Decode a descriptor (PTX ISA, "Shared memory descriptor", "Matrix Descriptor")."""
    start = (bits & 0x3FFF) << 4
    leading = (bits >> 16 & 0x3FFF) << 4
    stride = (bits >> 32 & 0x3FFF) << 4
    if bits >> 49 & 7:
        raise d.error(f"descriptor {bits:#018x}: a matrix base offset is not modelled")
    if blackwell:
        if bits >> 46 & 7 != 1:
            raise d.error(f"descriptor {bits:#018x}: bits 46..48 must be 0b001")
        if bits >> 52 & 1:
            raise d.error(f"descriptor {bits:#018x}: absolute leading offsets are not modelled")
        spans = {0: 0, 2: 128, 4: 64, 6: 32}
        mode = bits >> 61 & 7
    else:
        spans = {0: 0, 1: 128, 2: 64, 3: 32}
        mode = bits >> 62 & 3
    if mode not in spans:
        raise d.error(f"descriptor {bits:#018x}: swizzle mode {mode} is not modelled")
    return SharedDescriptor(start, leading, stride, spans[mode])


@lru_cache(maxsize=256)
def _canonical(rows: int, leading: int, stride: int, span: int, mn_major: bool) -> Ints:
    """Return [rows, K] byte offsets of 2-byte elements in a canonical layout, before swizzling.

    CuTe writes these layouts in mma_traits_sm90_gmma.hpp."""
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


class Layout(NamedTuple):
    """[rows, K] the byte offset of each element, and those of all bytes, in shared memory."""

    elements: Ints
    touched: Ints
    low: int
    high: int


@lru_cache(maxsize=512)
def layout_of(
    descriptor: SharedDescriptor, rows: int, mn_major: bool, first: int = 0, end: int | None = None
) -> Layout:
    """Return the layout of a matrix of so many rows, or of the rows [first, end) of it."""
    table = _canonical(rows, descriptor.leading, descriptor.stride, descriptor.span, mn_major)
    elements = swizzle(descriptor.start + table, descriptor.span)[first:end]
    touched = np.stack([elements, elements + 1], axis=-1).reshape(-1)
    return Layout(elements, touched, int(touched.min()), int(touched.max()))


def read(operation: Operation, cta: Cta, layout: Layout, bf16: bool) -> tuple[Array, Mask]:
    """Return the elements as float64 [rows, K], and which of them are poison."""
    memory = cta.shared
    offsets, touched, low, high = layout
    if low < SHARED_RESERVED or high >= cta.shared_end:
        operation.report(
            "out-of-bounds",
            f"{operation.what} reads outside the CTA's shared memory "
            f"({SHARED_RESERVED:#x}..{cta.shared_end:#x})",
            address=memory.describe(low if low < SHARED_RESERVED else high),
        )
        return np.full(offsets.shape, np.nan), np.ones(offsets.shape, dtype=bool)
    memory.note_read(touched, operation)
    raw = memory.data[touched].view(np.uint16).reshape(offsets.shape)
    state = memory.state[touched]
    if state.tobytes().count(VALID) < state.size:
        poison = (state != VALID).reshape(*offsets.shape, 2).any(axis=-1)
    else:
        poison = np.zeros(offsets.shape, dtype=bool)
    return decode_halves(raw, bf16), poison


def rows_of(poison: Mask) -> Mask:
    found: Mask = np.logical_or.reduce(poison, axis=1)
    return found


def decode_halves(raw: Array, bf16: bool) -> Array:
    values = floats.bf16_to_f32(raw) if bf16 else raw.view(np.float16)
    return values.astype(np.float64)


@dataclass(frozen=True)
class InstructionDescriptor:
    """An instruction descriptor of kind::f16 (PTX ISA, "Instruction descriptor")."""

    m: int
    n: int
    a_bf16: bool
    b_bf16: bool
    a_negated: bool
    b_negated: bool
    a_mn_major: bool
    b_mn_major: bool


def decode_instruction(d: Decoding, bits: int, group: int) -> InstructionDescriptor:
    m, n = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
    if bits & 0b1111 or bits >> 6 & 1 or bits >> 23 & 1 or bits >> 29:
        raise d.error(f"instruction descriptor {bits:#010x}: sparsity, saturation, .ws shifts "
                        "and reserved bits are not modelled")  # fmt: skip
    if bits >> 4 & 3 != 1:
        raise d.error(f"instruction descriptor {bits:#010x}: D must be F32")
    a, b = bits >> 7 & 7, bits >> 10 & 7
    if a > 1 or b > 1:
        raise d.error(f"instruction descriptor {bits:#010x}: A and B must be F16 or BF16")
    sizes = (64, 128) if group == 1 else (128, 256)
    step = {(1, 64): 8, (1, 128): 16, (2, 128): 16, (2, 256): 16}.get((group, m))
    if m not in sizes or step is None or not step <= n <= 256 or n % step:
        raise d.error(f"instruction descriptor {bits:#010x}: no shape M={m}, N={n}")
    return InstructionDescriptor(
        m, n, bool(a), bool(b), bool(bits >> 13 & 1), bool(bits >> 14 & 1),
        bool(bits >> 15 & 1), bool(bits >> 16 & 1),
    )  # fmt: skip


@lru_cache(maxsize=64)
def accumulator_cells(m: int, n: int, group: int, lane: int, column: int) -> Ints:
    """Return [rows of one CTA, n] TMEM cells of D.

    One CTA: M=128 has row r in lane r; M=64 has row r in lane 32 (r/16) + r mod 16, from lane 0 or
    16. Two CTAs: M=256 is as M=128 in each; M=128 has 64 rows in each, with the upper half of the
    columns in lanes 64.. (PTX ISA, "Data path layout organization")."""
    rows = m // group
    r, c = np.meshgrid(np.arange(rows), np.arange(n), indexing="ij")
    if group == 2 and m == 128:
        return (lane + r + 64 * (c // (n // 2))) * COLUMNS + column + c % (n // 2)
    if rows == 64:
        r = r // 16 * 32 + r % 16
    return (lane + r) * COLUMNS + column + c
