"""The emulator's tensor cores: hand-written GEMMs with tcgen05 and wgmma, exact on integers.

One kernel text for each architecture, generated for a tile, operand majors and a swizzle. TMA
writes the operands, so TMA's swizzle, the descriptors and the canonical layouts are checked against
each other; the result is compared with NumPy's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from test_emulator import SCHEDULES, kinds, module
from test_emulator_protocol import check, mutate

from build_kernels.emulator import DeviceArray, Launch, Schedule, TensorMap, emulate

K_BLOCK = 64  # elements of K in one pass through shared memory
STEPS = K_BLOCK // 16
SPAN = {"none": 0, "32B": 32, "64B": 64, "128B": 128}


@dataclass(frozen=True)
class Operand:
    """rows x K of 16-bit elements, K-major or MN-major in memory, with a swizzle."""

    rows: int
    mn_major: bool = False
    swizzle: str = "128B"

    @property
    def width(self) -> int:
        """Elements of a box's fastest dimension."""
        return SPAN[self.swizzle] // 2 or 8

    @property
    def box(self) -> tuple[int, int]:
        return (self.width, K_BLOCK if self.mn_major else self.rows)

    @property
    def bytes(self) -> int:
        return self.rows * K_BLOCK * 2

    def boxes(self, block: str) -> list[tuple[int, str]]:
        """(byte offset, coordinates) of each box of a K block at element `block` of K."""
        size = self.width * self.box[1] * 2
        if self.mn_major:
            count = self.rows // self.width
            return [(i * size, f"{{{i * self.width}, {block}}}") for i in range(count)]
        found = []
        for i in range(K_BLOCK // self.width):
            found.append((i * size, f"{{{block}_{i}, 0}}"))
        return found

    def strides(self) -> tuple[int, int]:
        """Leading and stride byte offsets of the descriptor."""
        span = SPAN[self.swizzle]
        box_bytes = self.width * self.box[1] * 2
        if self.mn_major:
            return (box_bytes, 8 * span) if span else (128, box_bytes)
        return (16, 8 * span) if span else (box_bytes, 128)

    def step(self, k: int) -> int:
        """Byte offset of K step k from the operand's start."""
        span = SPAN[self.swizzle]
        if self.mn_major:
            return k * 16 * (span or 16)
        box_bytes = self.width * self.box[1] * 2
        inside = self.width * 2
        return k * 32 // inside * box_bytes + k * 32 % inside

    def descriptor(self, blackwell: bool) -> int:
        leading, stride = self.strides()
        bits = leading >> 4 << 16 | stride >> 4 << 32
        if blackwell:
            mode = {"none": 0, "128B": 2, "64B": 4, "32B": 6}[self.swizzle]
            return bits | 1 << 46 | mode << 61
        return bits | {"none": 0, "128B": 1, "64B": 2, "32B": 3}[self.swizzle] << 62


def loads(operand: Operand, name: str, start: int, block: int) -> str:
    """TMA loads of one K block; coordinates are literals."""
    text = ""
    for offset, where in operand.boxes("K"):
        where = where.replace("K", str(block * K_BLOCK))
        if not operand.mn_major:
            column, index = where[1:].split(",")[0].split("_")
            where = f"{{{int(column) + int(index) * operand.width}, 0}}"
        text += (
            "    cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes "
            f"[%r1+{start + offset}], [%rd{name}, {where}], [%r2];\n"
        )
    return text


def descriptors(a: Operand, b: Operand, k: int, blackwell: bool) -> str:
    text = ""
    for target, operand, start in (("%rd10", a, 0), ("%rd11", b, a.bytes)):
        text += f"""
    add.u32 %r20, %r1, {start + operand.step(k)};
    shr.u32 %r20, %r20, 4;
    and.b32 %r20, %r20, 0x3FFF;
    cvt.u64.u32 {target}, %r20;
    or.b64 {target}, {target}, {operand.descriptor(blackwell)};
"""
    return text


PROLOGUE = """
    ld.param.u64 %rd0, [out];
    mov.b64 %rd2, amap;
    cvta.param.u64 %rd2, %rd2;
    mov.b64 %rd3, bmap;
    cvta.param.u64 %rd3, %rd3;
    mov.u32 %r0, %tid.x;
    shr.u32 %r3, %r0, 5;
    mov.u32 %r1, tiles;
    mov.u32 %r2, bars;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%r2], 1;
    mbarrier.init.shared.b64 [%r2+8], EMPTIERS;
    fence.mbarrier_init.release.cluster;
READY:
"""
PARAMETERS = ".param .align 64 .b8 amap[128], .param .align 64 .b8 bmap[128], .param .u64 out"
GLOBALS = """
.shared .align 8 .b64 bars[4];
.shared .align 4 .b32 slot;
.extern .shared .align 1024 .b8 tiles[];
"""
COMMIT = "    tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2+8];\n"
WAIT = """
{label}:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r2+{bar}], {parity};
    @!%p3 bra {label};
"""


def tcgen05_gemm(a: Operand, b: Operand, blocks: int, bf16: bool) -> str:
    """128 threads; thread 0 loads and multiplies, each warp reads its lanes of TMEM."""
    m, n = a.rows, b.rows
    columns = max(32, 1 << (n - 1).bit_length())
    kind = 0x490 if bf16 else 0x10
    shape = kind | a.mn_major << 15 | b.mn_major << 16 | n >> 3 << 17 | m >> 4 << 24
    text = PROLOGUE.replace("EMPTIERS", "1")
    text += f"""
    setp.ne.u32 %p2, %r3, 0;
    @%p2 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], {columns};
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
ALLOCATED:
    tcgen05.fence::before_thread_sync;
    bar.sync 0;
    tcgen05.fence::after_thread_sync;
    ld.shared.b32 %r4, [slot];
    @%p1 bra MULTIPLIED;
"""
    for block in range(blocks):
        if block:
            text += WAIT.format(label=f"EMPTY{block}", bar=8, parity=(block - 1) & 1)
        text += f"    mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {a.bytes + b.bytes};\n"
        text += loads(a, "2", 0, block) + loads(b, "3", a.bytes, block)
        text += WAIT.format(label=f"FULL{block}", bar=0, parity=block & 1)
        for k in range(STEPS):
            text += descriptors(a, b, k, True)
            text += f"""
    setp.ne.u32 %p4, {int(block + k > 0)}, 0;
    tcgen05.mma.cta_group::1.kind::f16 [%r4], %rd10, %rd11, {shape}, %p4;
"""
        text += COMMIT
    text += "MULTIPLIED:\n"
    text += WAIT.format(label="DONE0", bar=8, parity=(blocks - 1) & 1)
    text += "    tcgen05.fence::after_thread_sync;\n"
    registers = ", ".join(f"%f{i}" for i in range(n))
    text += f"""
    shl.b32 %r5, %r3, 21;
    add.u32 %r5, %r5, %r4;
    tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {{{registers}}}, [%r5];
    tcgen05.wait::ld.sync.aligned;
"""
    if m == 64:
        # Rows 16 w .. + 15 are in the first half of warp w's lanes.
        text += """
    and.b32 %r6, %r0, 31;
    setp.ge.u32 %p5, %r6, 16;
    @%p5 bra STORED;
    shl.b32 %r7, %r3, 4;
    add.u32 %r0, %r7, %r6;
"""
    text += f"    mul.wide.u32 %rd1, %r0, {4 * n};\n    add.u64 %rd0, %rd0, %rd1;\n"
    text += "".join(f"    st.global.f32 [%rd0+{4 * i}], %f{i};\n" for i in range(n))
    text += f"""
STORED:
    tcgen05.fence::before_thread_sync;
    bar.sync 0;
    tcgen05.fence::after_thread_sync;
    @%p2 bra FREED;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, {columns};
FREED:
"""
    return text


def wgmma_gemm(a: Operand, b: Operand, blocks: int, bf16: bool) -> str:
    """128 threads; thread 0 loads, the warpgroup multiplies."""
    n = b.rows
    kind = "bf16" if bf16 else "f16"
    registers = ", ".join(f"%f{i}" for i in range(n // 2))
    text = PROLOGUE.replace("EMPTIERS", "128")
    text += "    bar.sync 0;\n"
    text += "".join(f"    mov.f32 %f{i}, 0f00000000;\n" for i in range(n // 2))
    for block in range(blocks):
        text += f"    @%p1 bra LOADED{block};\n"
        if block:
            text += WAIT.format(label=f"EMPTY{block}", bar=8, parity=(block - 1) & 1)
        text += f"    mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {a.bytes + b.bytes};\n"
        text += loads(a, "2", 0, block) + loads(b, "3", a.bytes, block)
        text += f"LOADED{block}:\n"
        text += WAIT.format(label=f"FULL{block}", bar=0, parity=block & 1)
        text += "    wgmma.fence.sync.aligned;\n"
        for k in range(STEPS):
            text += descriptors(a, b, k, False)
            text += f"""
    setp.ne.u32 %p4, {int(block + k > 0)}, 0;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{registers}}}, %rd10, %rd11, \
%p4, 1, 1, {int(a.mn_major)}, {int(b.mn_major)};
"""
        text += """
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mbarrier.arrive.shared.b64 _, [%r2+8];
"""
    text += f"""
    and.b32 %r6, %r0, 31;
    shr.u32 %r7, %r6, 2;
    shl.b32 %r8, %r3, 4;
    add.u32 %r7, %r7, %r8;
    and.b32 %r9, %r6, 3;
    shl.b32 %r9, %r9, 1;
    mad.lo.u32 %r7, %r7, {n}, %r9;
    mul.wide.u32 %rd1, %r7, 4;
    add.u64 %rd0, %rd0, %rd1;
"""
    for i in range(n // 2):
        row, column = 8 * (i // 2 % 2), 8 * (i // 4) + i % 2
        text += f"    st.global.f32 [%rd0+{4 * (row * n + column)}], %f{i};\n"
    return text


def as_bf16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def run_gemm(text, a, b, blocks, arch, bf16, schedule, shared=None, **options):
    """Returns (result, expected); options: keywords of `emulate`."""
    rng = np.random.default_rng(a.rows * b.rows + blocks)
    depth = blocks * K_BLOCK
    arrays, maps, values = [], [], []
    for name, operand in (("a", a), ("b", b)):
        matrix = rng.integers(-3, 4, (operand.rows, depth)).astype(np.float32)
        values.append(matrix)
        stored = matrix.T if operand.mn_major else matrix
        data = as_bf16(stored) if bf16 else np.ascontiguousarray(stored, np.float16)
        arrays.append(DeviceArray(name=name, data=data, read_only=True))
        maps.append(
            TensorMap(
                array=arrays[-1],
                element_type="bfloat16" if bf16 else "float16",
                dims=(data.shape[1], data.shape[0]),
                strides=(data.shape[1] * 2,),
                box=operand.box,
                swizzle=operand.swizzle,
            )
        )
    out = DeviceArray(name="out", data=np.zeros((a.rows, b.rows), np.float32), initialised=False)
    result = emulate(
        module(text, parameters=PARAMETERS, target=arch, globals_=GLOBALS),
        Launch(
            grid=(1, 1, 1), block=(128, 1, 1), arch=arch,
            dynamic_shared_bytes=a.bytes + b.bytes if shared is None else shared,
        ),
        [*maps, out],
        schedule,
        **options,
    )  # fmt: skip
    return result, values[0] @ values[1].T


MAJORS = [(False, False), (True, True), (False, True), (True, False)]


@pytest.mark.quick(3)
@pytest.mark.parametrize("swizzle", SPAN)
@pytest.mark.parametrize(("a_mn", "b_mn"), MAJORS)
@pytest.mark.parametrize("m", [64, 128])
def test_tcgen05_layouts(m, a_mn, b_mn, swizzle):
    a, b = Operand(m, a_mn, swizzle), Operand(64, b_mn, swizzle)
    result, expected = run_gemm(
        tcgen05_gemm(a, b, 1, True), a, b, 1, "sm_100a", True, Schedule(policy="latest")
    )
    assert [str(f) for f in result.findings] == []
    np.testing.assert_array_equal(result.memory["out"], expected)


@pytest.mark.quick(6)
@pytest.mark.parametrize("swizzle", SPAN)
@pytest.mark.parametrize(("a_mn", "b_mn"), MAJORS)
def test_wgmma_layouts(a_mn, b_mn, swizzle):
    a, b = Operand(64, a_mn, swizzle), Operand(64, b_mn, swizzle)
    result, expected = run_gemm(
        wgmma_gemm(a, b, 1, True), a, b, 1, "sm_90a", True, Schedule(policy="latest")
    )
    assert [str(f) for f in result.findings] == []
    np.testing.assert_array_equal(result.memory["out"], expected)


@pytest.mark.quick(8)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("make", "arch"), [(tcgen05_gemm, "sm_100a"), (wgmma_gemm, "sm_90a")])
def test_gemm_in_every_schedule(make, arch, bf16, schedule):
    """One pass, under each policy and several seeds."""
    a, b = Operand(64), Operand(16)
    result, expected = run_gemm(make(a, b, 1, bf16), a, b, 1, arch, bf16, schedule)
    assert [str(f) for f in result.findings] == []
    np.testing.assert_array_equal(result.memory["out"], expected)


TCGEN05_MUTANTS = {
    "no wait for the load": ([("    @!%p3 bra FULL0;", "")], "race"),
    "no wait for the multiplication": ([("    @!%p3 bra DONE0;", "")], "race"),
    "no commit": ([("    tcgen05.commit", "    @!%p4 tcgen05.commit")], "deadlock"),
    "commit before the multiplication": (
        [(COMMIT, ""), ("    mbarrier.arrive.expect_tx", COMMIT + "    mbarrier.arrive.expect_tx")],
        "race",
    ),
    "wrong byte count": ([("[%r2], 10240;", "[%r2], 8192;")], "deadlock"),
    "no wait::ld": ([("    tcgen05.wait::ld.sync.aligned;", "")], "unwaited-register"),
    "no fence after the wait": (
        [("DONE0;\n    tcgen05.fence::after_thread_sync;", "DONE0;\n")], "missing-tcgen05-fence"),
    "no dealloc": ([("    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 32;", "")],
                   "tmem-leak"),
    "dealloc before the others have read": (
        [("STORED:\n    tcgen05.fence::before_thread_sync;\n    bar.sync 0;", "STORED:\n")],
        "race"),
    "dealloc of other columns": ([("b32 %r4, 32;", "b32 %r4, 64;")], "tmem-allocation"),
    "another warp's lanes": ([("shl.b32 %r5, %r3, 21;", "mov.u32 %r5, 0;")], "tmem-lane"),
    "columns that are not allocated": (
        [("[%r5];", "[%r5+32];")], "tmem-unallocated"),
    "allocation after giving up": (
        [("    tcgen05.relinquish", "    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
          "    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], 32;"
          "    tcgen05.relinquish")], "tmem-allocation"),
    "accumulate into nothing": ([("setp.ne.u32 %p4, 0, 0;", "setp.ne.u32 %p4, 1, 0;")], "poison"),
    "address not waited for": (
        [("ALLOCATED:\n    tcgen05.fence::before_thread_sync;\n    bar.sync 0;", "ALLOCATED:\n")],
        "race"),
    "exit while it multiplies": (
        [("    @!%p3 bra DONE0;", ""), ("MULTIPLIED:", "    bra FREED;\nMULTIPLIED:")],
        "unfinished-at-exit"),
}  # fmt: skip


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", TCGEN05_MUTANTS)
def test_tcgen05_mutants_are_found(name):
    changes, expected = TCGEN05_MUTANTS[name]
    a, b = Operand(64), Operand(16)
    text = mutate(tcgen05_gemm(a, b, 1, True), *changes)
    results = [run_gemm(text, a, b, 1, "sm_100a", True, schedule)[0] for schedule in SCHEDULES]
    found = {str(f)[:300] for result in results for f in result.findings}
    assert any(expected in kinds(result) for result in results), found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # swizzle mode 64B, a stride of 512 bytes, the next K step left out, another shape
        (Operand(64).descriptor(True), Operand(64, swizzle="64B").descriptor(True)),
        (Operand(64).descriptor(True), Operand(64).descriptor(True) ^ (64 ^ 32) << 32),
        ("%r1, 32;", "%r1, 64;"),
        ("and.b32 %r20, %r20, 0x3FFF;\n    cvt.u64.u32 %rd11, %r20;",
         "and.b32 %r20, %r20, 0x3FF0;\n    cvt.u64.u32 %rd11, %r20;"),
        (str(0x490 | 2 << 17 | 4 << 24), str(0x490 | 1 << 16 | 2 << 17 | 4 << 24)),
    ],
)  # fmt: skip
def test_wrong_descriptors_give_wrong_results(old, new):
    a, b = Operand(64), Operand(16)
    text = mutate(tcgen05_gemm(a, b, 1, True), (str(old), str(new)))
    result, expected = run_gemm(text, a, b, 1, "sm_100a", True, Schedule())
    assert not np.array_equal(result.memory["out"], expected)


WGMMA_MUTANTS = {
    "no wait for the load": ([("    @!%p3 bra FULL0;", "")], "race"),
    "no wait for the multiplication": (
        [("    wgmma.wait_group.sync.aligned 0;", "")], "unwaited-register"),
    "no commit": ([("    wgmma.commit_group.sync.aligned;", "")], "unwaited-register"),
    "a group too few": ([("wait_group.sync.aligned 0;", "wait_group.sync.aligned 1;")],
                        "unwaited-register"),
    "no fence": ([("    wgmma.fence.sync.aligned;", "")], "missing-wgmma-fence"),
    "accumulators written behind the fence": (
        [("    wgmma.fence.sync.aligned;", "    wgmma.fence.sync.aligned;\n"
          "    mov.f32 %f3, 0f00000000;")], "missing-wgmma-fence"),
    "another initialisation": ([("mbarrier.init.shared.b64 [%r2], 1;",
                                 "mbarrier.init.shared.b64 [%r2], 2;")], "deadlock"),
}  # fmt: skip


@pytest.mark.quick(8)
@pytest.mark.parametrize("name", WGMMA_MUTANTS)
def test_wgmma_mutants_are_found(name):
    changes, expected = WGMMA_MUTANTS[name]
    a, b = Operand(64), Operand(16)
    text = mutate(wgmma_gemm(a, b, 1, True), *changes)
    results = [run_gemm(text, a, b, 1, "sm_90a", True, schedule)[0] for schedule in SCHEDULES]
    found = {str(f)[:300] for result in results for f in result.findings}
    assert any(expected in kinds(result) for result in results), found


def test_a_stage_reused_before_the_tensor_core_has_read_it():
    a, b = Operand(64), Operand(16)
    for make, arch in ((wgmma_gemm, "sm_90a"),):
        text = make(a, b, 2, True)
        for schedule in SCHEDULES:
            result, expected = run_gemm(text, a, b, 2, arch, True, schedule)
            assert [str(f) for f in result.findings] == []
            np.testing.assert_array_equal(result.memory["out"], expected)
        broken = mutate(text, ("    @!%p3 bra EMPTY1;", ""))
        found = [kinds(run_gemm(broken, a, b, 2, arch, True, s)[0]) for s in SCHEDULES]
        assert any("race" in found_ for found_ in found)


def test_generic_writes_need_a_proxy_fence_before_the_tensor_core():
    """Shared memory filled with ordinary stores instead of TMA."""
    a, b = Operand(64), Operand(16)
    text = tcgen05_gemm(a, b, 1, True)
    head, tail = text.split("    mbarrier.arrive.expect_tx", 1)
    tail = tail[tail.index("    add.u32 %r20") :]
    fill = """
    mov.u32 %r10, 0;
FILL:
    add.u32 %r11, %r1, %r10;
    st.shared.b32 [%r11], 0x3F803F80;
    add.u32 %r10, %r10, 4;
    setp.lt.u32 %p6, %r10, 10240;
    @%p6 bra FILL;
    fence.proxy.async.shared::cta;
"""
    good = run_gemm(head + fill + tail, a, b, 1, "sm_100a", True, Schedule())[0]
    assert [str(f) for f in good.findings] == []
    assert set(good.memory["out"].reshape(-1)) == {64.0}
    bad = mutate(head + fill + tail, ("    fence.proxy.async.shared::cta;", ""))
    result = run_gemm(bad, a, b, 1, "sm_100a", True, Schedule())[0]
    assert kinds(result) == {"missing-proxy-fence"}


def test_operands_past_the_end_of_shared_memory():
    a, b = Operand(64), Operand(16)
    text = mutate(tcgen05_gemm(a, b, 1, True), (f"%r1, {a.bytes};", f"%r1, {a.bytes + 4096};"))
    result, _ = run_gemm(text, a, b, 1, "sm_100a", True, Schedule())
    assert {"out-of-bounds", "poison"} <= kinds(result)
    assert result.findings[0].line > 0


A_IN_REGISTERS = """
    ld.param.u64 %rd0, [out];
    ld.param.u64 %rd2, [words];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd1, %r0, 16;
    add.u64 %rd2, %rd2, %rd1;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd2];
    mov.u32 %r1, tiles;
    shl.b32 %r2, %r0, 2;
    add.u32 %r3, %r1, %r2;
    setp.ge.u32 %p1, %r0, 64;
    @!%p1 st.shared.b32 [%r3], 0x3F803F80;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    shr.u32 %r4, %r1, 4;
    cvt.u64.u32 %rd11, %r4;
    or.b64 %rd11, %rd11, DESCRIPTOR;
    mov.pred %p2, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, \
{%r10, %r11, %r12, %r13}, %rd11, %p2, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.u64 %rd0, %rd0, %rd1;
    st.global.v4.b32 [%rd0], {%f0, %f1, %f2, %f3};
"""


def test_wgmma_with_a_in_registers():
    """B is all ones, without swizzle: each accumulator is the sum of its row of A."""
    matrix = np.random.default_rng(3).integers(-9, 10, (64, 16)).astype(np.float32)
    halves = as_bf16(matrix).astype(np.uint32)
    words = np.zeros((128, 4), np.uint32)
    for thread in range(128):
        for i in range(4):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i % 2)
            column = thread % 4 * 2 + 8 * (i // 2)
            words[thread, i] = halves[row, column] | halves[row, column + 1] << 16
    # 8 rows of 16 bytes make a core matrix; the second half of K is 128 bytes further.
    text = A_IN_REGISTERS.replace("DESCRIPTOR", str(128 >> 4 << 16 | 256 >> 4 << 32))
    sums = matrix.sum(axis=1)

    def run(text, schedule):
        out = DeviceArray(name="out", data=np.zeros((128, 4), np.float32), initialised=False)
        return emulate(
            module(
                text, parameters=".param .u64 out, .param .u64 words",
                globals_=".extern .shared .align 1024 .b8 tiles[];",
            ),
            Launch(grid=(1, 1, 1), block=(128, 1, 1), arch="sm_90a", dynamic_shared_bytes=256),
            [out, DeviceArray(name="words", data=words, read_only=True)],
            schedule,
        )  # fmt: skip

    for schedule in SCHEDULES:
        result = run(text, schedule)
        assert [str(f) for f in result.findings] == []
        for thread in range(128):
            row = thread // 32 * 16 + thread % 32 // 4
            expected = [sums[row], sums[row], sums[row + 8], sums[row + 8]]
            assert result.memory["out"][thread].tolist() == expected
    unfenced = mutate(text, ("    wgmma.fence.sync.aligned;", ""))
    assert "missing-wgmma-fence" in kinds(run(unfenced, Schedule()))
    unwritten = mutate(text, ("    @!%p1 st.shared.b32", "    @%p1 st.shared.b32"))
    assert "poison" in kinds(run(unwritten, Schedule()))


REUSE = """
    mov.u32 %r0, %tid.x;
    shr.u32 %r3, %r0, 5;
    setp.ne.u32 %p1, %r0, 0;
    setp.ne.u32 %p2, %r3, 0;
    @%p2 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], 32;
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    @%p1 bra ALLOCATED;
    mbarrier.init.shared.b64 [bars], 1;
    fence.mbarrier_init.release.cluster;
ALLOCATED:
    bar.sync 0;
    ld.shared.b32 %r4, [slot];
    mov.u32 %r2, tiles;
    shr.u32 %r2, %r2, 4;
    cvt.u64.u32 %rd10, %r2;
    or.b64 %rd10, %rd10, DESCRIPTOR;
    mov.pred %p5, 0;
    @%p1 bra FIRST;
    tcgen05.mma.cta_group::1.kind::f16 [%r4], %rd10, %rd10, SHAPE, %p5;
    tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bars];
FIRST:
    mbarrier.try_wait.parity.shared.b64 %p6, [bars], 0;
    @!%p6 bra FIRST;
    tcgen05.fence::after_thread_sync;
    shl.b32 %r5, %r3, 21;
    add.u32 %r5, %r5, %r4;
    tcgen05.ld.sync.aligned.32x32b.x8.b32 {%r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17}, [%r5];
    tcgen05.wait::ld.sync.aligned;
    tcgen05.fence::before_thread_sync;
    bar.sync 1, 128;
    @%p1 bra SECOND;
    tcgen05.fence::after_thread_sync;
    tcgen05.mma.cta_group::1.kind::f16 [%r4], %rd10, %rd10, SHAPE, %p5;
    tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bars];
SECOND:
    mbarrier.try_wait.parity.shared.b64 %p6, [bars], 1;
    @!%p6 bra SECOND;
    @%p2 bra FREED;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 32;
FREED:
"""


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (None, ""),
        ([("    tcgen05.fence::before_thread_sync;", "")], "missing-tcgen05-fence"),
        ([("    tcgen05.fence::after_thread_sync;\n    tcgen05.mma", "    tcgen05.mma")],
         "missing-tcgen05-fence"),
        ([("    bar.sync 1, 128;", "")], "race"),
        ([("    tcgen05.wait::ld.sync.aligned;", "")], "race"),
        ([("    @!%p6 bra SECOND;", "")], "race"),
        ([("shared.b64 %p6, [bars], 1", "shared.b64 %p6, [bars], 0")], "race"),
        ([("mbarrier.init.shared.b64 [bars], 1", "mbarrier.init.shared.b64 [bars], 2")],
         "deadlock"),
    ],
)  # fmt: skip
def test_an_accumulator_is_reused_after_it_was_read(changes, expected):
    """A and B are the same poison in shared memory: nothing of it leaves, so it is no finding."""
    text = REUSE.replace("DESCRIPTOR", str(1 << 46 | 128 >> 4 << 32 | 2048 >> 4 << 16)).replace(
        "SHAPE", str(0x490 | 8 >> 3 << 17 | 64 >> 4 << 24)
    )

    def run(text, schedule):
        out = DeviceArray(name="out", data=np.zeros(1, np.uint32))
        return emulate(
            module(text, target="sm_100a", globals_=GLOBALS),
            Launch(grid=(1, 1, 1), block=(128, 1, 1), arch="sm_100a", dynamic_shared_bytes=4096),
            [out],
            schedule,
        )

    check(run, text, changes, expected)


CTA_PAIR = """
    ld.param.u64 %rd0, [out];
    ld.param.u64 %rd2, [a];
    ld.param.u64 %rd3, [b];
    mov.u32 %r0, %tid.x;
    shr.u32 %r3, %r0, 5;
    mov.u32 %r1, %cluster_ctarank;
    mov.u32 %r2, tiles;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [bars], 1;
    fence.mbarrier_init.release.cluster;
READY:
    // Row t of this CTA's 128 rows of A: two chunks of 16 bytes, 2048 bytes apart.
    shl.b32 %r10, %r1, 7;
    add.u32 %r10, %r10, %r0;
    mul.wide.u32 %rd4, %r10, 32;
    add.u64 %rd4, %rd4, %rd2;
    ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%rd4];
    ld.global.v4.b32 {%r15, %r16, %r17, %r18}, [%rd4+16];
    shl.b32 %r19, %r0, 4;
    add.u32 %r19, %r19, %r2;
    st.shared.v4.b32 [%r19], {%r11, %r12, %r13, %r14};
    st.shared.v4.b32 [%r19+2048], {%r15, %r16, %r17, %r18};
    // Row t of this CTA's 32 rows of B.
    setp.ge.u32 %p2, %r0, 32;
    @%p2 bra FILLED;
    shl.b32 %r10, %r1, 5;
    add.u32 %r10, %r10, %r0;
    mul.wide.u32 %rd4, %r10, 32;
    add.u64 %rd4, %rd4, %rd3;
    ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%rd4];
    ld.global.v4.b32 {%r15, %r16, %r17, %r18}, [%rd4+16];
    st.shared.v4.b32 [%r19+4096], {%r11, %r12, %r13, %r14};
    st.shared.v4.b32 [%r19+4608], {%r15, %r16, %r17, %r18};
FILLED:
    fence.proxy.async.shared::cta;
    setp.ne.u32 %p3, %r3, 0;
    @%p3 bra ALLOCATED;
    tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [slot], 64;
    tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;
ALLOCATED:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    tcgen05.fence::after_thread_sync;
    ld.shared.b32 %r4, [slot];
    add.u32 %r20, %r1, %r0;
    setp.ne.u32 %p4, %r20, 0;
    @%p4 bra MULTIPLIED;
    shr.u32 %r21, %r2, 4;
    cvt.u64.u32 %rd10, %r21;
    add.u64 %rd11, %rd10, 256;
    or.b64 %rd10, %rd10, A_DESCRIPTOR;
    or.b64 %rd11, %rd11, B_DESCRIPTOR;
    mov.pred %p5, 0;
    tcgen05.mma.cta_group::2.kind::f16 [%r4], %rd10, %rd11, SHAPE, %p5;
    mov.u16 %rs1, 3;
    tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 \
[bars], %rs1;
MULTIPLIED:
    mbarrier.try_wait.parity.shared.b64 %p6, [bars], 0;
    @!%p6 bra MULTIPLIED;
    tcgen05.fence::after_thread_sync;
    shl.b32 %r5, %r3, 21;
    add.u32 %r5, %r5, %r4;
    tcgen05.ld.sync.aligned.32x32b.x64.b32 {REGISTERS}, [%r5];
    tcgen05.wait::ld.sync.aligned;
    shl.b32 %r10, %r1, 7;
    add.u32 %r10, %r10, %r0;
    mul.wide.u32 %rd4, %r10, 256;
    add.u64 %rd0, %rd0, %rd4;
STORES
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    @%p3 bra FREED;
    tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r4, 64;
FREED:
"""


@pytest.mark.slow
def test_a_multiplication_by_a_pair_of_ctas():
    """M = 256, N = 64: each CTA holds half of A's rows, half of B's, and half of D's."""
    rng = np.random.default_rng(8)
    a = rng.integers(-9, 10, (256, 16)).astype(np.float32)
    b = rng.integers(-9, 10, (64, 16)).astype(np.float32)
    version = 1 << 46 | 128 >> 4 << 32
    stores = "".join(f"    st.global.f32 [%rd0+{4 * i}], %f{i};\n" for i in range(64))
    text = (
        CTA_PAIR.replace("A_DESCRIPTOR", str(version | 2048 >> 4 << 16))
        .replace("B_DESCRIPTOR", str(version | 512 >> 4 << 16))
        .replace("SHAPE", str(0x490 | 64 >> 3 << 17 | 256 >> 4 << 24))
        .replace("REGISTERS", ", ".join(f"%f{i}" for i in range(64)))
        .replace("STORES", stores)
    )

    def run(text, schedule):
        out = DeviceArray(name="out", data=np.zeros((256, 64), np.float32), initialised=False)
        return emulate(
            module(
                text, parameters=".param .u64 out, .param .u64 a, .param .u64 b",
                target="sm_100a", globals_=GLOBALS,
            ),
            Launch(
                grid=(2, 1, 1), block=(128, 1, 1), cluster=(2, 1, 1), arch="sm_100a",
                dynamic_shared_bytes=5120,
            ),
            [
                out,
                DeviceArray(name="a", data=as_bf16(a), read_only=True),
                DeviceArray(name="b", data=as_bf16(b), read_only=True),
            ],
            schedule,
        )  # fmt: skip

    for schedule in SCHEDULES:
        result = run(text, schedule)
        assert [str(f) for f in result.findings] == []
        np.testing.assert_array_equal(result.memory["out"], a @ b.T)
    alone = mutate(text, ("mov.u16 %rs1, 3;", "mov.u16 %rs1, 1;"))
    assert "deadlock" in kinds(run(alone, Schedule()))
    unfenced = mutate(text, ("    fence.proxy.async.shared::cta;", ""))
    assert "missing-proxy-fence" in kinds(run(unfenced, Schedule()))
    sync = "    barrier.cluster.arrive.aligned;\n    barrier.cluster.wait.aligned;\n"
    early = mutate(text, (sync + "    @%p3 bra FREED", "    @%p3 bra FREED"))
    assert any("race" in kinds(run(early, schedule)) for schedule in SCHEDULES)
    without_peer = mutate(
        text, (sync + "    @%p3 bra FREED", "    bar.sync 0;\n    @%p3 bra FREED")
    )
    assert all("race" in kinds(run(without_peer, schedule)) for schedule in SCHEDULES)


SHAPES = """
    ld.param.u64 %rd0, [out];
    mov.u32 %r0, %tid.x;
    shr.u32 %r3, %r0, 5;
    setp.ne.u32 %p2, %r3, 0;
    @%p2 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], 32;
ALLOCATED:
    bar.sync 0;
    tcgen05.fence::after_thread_sync;
    ld.shared.b32 %r4, [slot];
    shl.b32 %r5, %r3, 21;
    add.u32 %r5, %r5, %r4;
    shl.b32 %r6, %r0, 8;
WRITE
    tcgen05.wait::st.sync.aligned;
READ
    tcgen05.wait::ld.sync.aligned;
    mul.wide.u32 %rd1, %r0, 64;
    add.u64 %rd0, %rd0, %rd1;
STORE
    tcgen05.fence::before_thread_sync;
    bar.sync 0;
    tcgen05.fence::after_thread_sync;
    @%p2 bra FREED;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 32;
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
FREED:
"""


@pytest.mark.parametrize(
    ("shape", "repeat", "count", "where"),
    [
        ("16x256b", 2, 8,
         lambda t, j: (t // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + t % 4 * 2 + j % 2)),
        ("16x128b", 4, 8, lambda t, j: (t // 4 + 8 * (j % 2), 4 * (j // 2) + t % 4)),
        ("16x64b", 8, 8, lambda t, j: (t // 4 + 8 * (t % 2), 2 * j + t // 2 % 2)),
        ("16x32bx2", 8, 8, lambda t, j: (t % 16, j + 8 * (t // 16))),
        ("32x32b", 8, 8, lambda t, j: (t, j)),
    ],
)  # fmt: skip
def test_tensor_memory_shapes(shape, repeat, count, where):
    """Written as 32x32b with thread * 256 + column, read in another shape."""
    write = "".join(f"    add.u32 %r{20 + i}, %r6, {i};\n" for i in range(16))
    values = ", ".join(f"%r{20 + i}" for i in range(16))
    write += f"    tcgen05.st.sync.aligned.32x32b.x16.b32 [%r5], {{{values}}};"
    targets = ", ".join(f"%r{40 + i}" for i in range(count))
    split = ", 8" if shape == "16x32bx2" else ""
    read = f"    tcgen05.ld.sync.aligned.{shape}.x{repeat}.b32 {{{targets}}}, [%r5]{split};"
    store = "".join(f"    st.global.b32 [%rd0+{4 * i}], %r{40 + i};\n" for i in range(count))
    text = SHAPES.replace("WRITE", write).replace("READ", read).replace("STORE", store)

    def run(text, schedule):
        out = DeviceArray(name="out", data=np.zeros((128, 16), np.uint32))
        return emulate(
            module(text, target="sm_100a", globals_=".shared .align 4 .b32 slot;"),
            Launch(grid=(1, 1, 1), block=(128, 1, 1), arch="sm_100a"),
            [out],
            schedule,
        )

    for schedule in SCHEDULES:
        result = run(text, schedule)
        assert [str(f) for f in result.findings] == []
        for thread in range(128):
            for j in range(count):
                lane, column = where(thread % 32, j)
                expected = (thread // 32 * 32 + lane) * 256 + column
                assert result.memory["out"][thread, j] == expected
    unwaited = mutate(text, ("    tcgen05.wait::st.sync.aligned;", ""))
    assert any("race" in kinds(run(unwaited, schedule)) for schedule in SCHEDULES)
