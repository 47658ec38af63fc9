"""Which function decodes which instruction."""

from __future__ import annotations

from collections.abc import Callable

from build_kernels.emulator.execution.warp import Outcome, Warp
from build_kernels.emulator.instructions import (
    arithmetic,
    atom_red,
    bits,
    collectives,
    cp_async_bulk,
    cvt,
    cvta_mapa,
    fence_barrier,
    ld_st,
    mbarrier,
    setp_selp_mov,
    st_async,
    tcgen05_mma,
    wgmma,
)
from build_kernels.emulator.instructions.operands import Context
from build_kernels.emulator.ptx.syntax import Instruction

Decoder = Callable[[Instruction, Context], Callable[[Warp], Outcome]]

DECODERS: dict[str, Decoder] = {
    **dict.fromkeys(("add", "sub", "mul"), arithmetic.add_sub_mul),
    "mad": arithmetic.mad,
    "fma": arithmetic.fma,
    **dict.fromkeys(("div", "rem"), arithmetic.divide),
    **dict.fromkeys(("neg", "abs"), arithmetic.negate),
    **dict.fromkeys(("min", "max"), arithmetic.extreme),
    **dict.fromkeys(
        ("ex2", "lg2", "sin", "cos", "tanh", "rsqrt", "rcp", "sqrt"), arithmetic.approximate
    ),
    "copysign": arithmetic.copysign,
    "testp": arithmetic.test_property,
    **dict.fromkeys(("and", "or", "xor", "not"), bits.logic_or_predicates),
    "cnot": bits.logic,
    **dict.fromkeys(("shl", "shr"), bits.shift),
    "shf": bits.funnel,
    "lop3": bits.lop3,
    "bfe": bits.extract,
    "bfi": bits.insert,
    "prmt": bits.permute,
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), bits.count),
    "setp": setp_selp_mov.set_predicate,
    "selp": setp_selp_mov.select,
    "mov": setp_selp_mov.move,
    "cvt": cvt.convert,
    **dict.fromkeys(("ld", "ldu"), ld_st.load),
    "st": ld_st.store,
    **dict.fromkeys(("atom", "red"), atom_red.atomic),
    "cvta": cvta_mapa.convert_address,
    "mapa": cvta_mapa.map_address,
    "getctarank": cvta_mapa.rank_of_address,
    "isspacep": cvta_mapa.is_space,
    "prefetch": cvta_mapa.prefetch,
    "createpolicy": cvta_mapa.create_policy,
    "shfl": collectives.shuffle,
    "vote": collectives.vote,
    "match": collectives.match,
    "redux": collectives.reduce,
    "elect": collectives.elect,
    "activemask": collectives.active_mask,
    **dict.fromkeys(("ret", "exit"), collectives.leave),
    "trap": collectives.trap,
    "bra": collectives.branch,
    **dict.fromkeys(("nanosleep", "pmevent", "setmaxnreg"), collectives.nothing),
    "griddepcontrol": collectives.dependency,
    **dict.fromkeys(("fence", "membar"), fence_barrier.fence),
    **dict.fromkeys(("bar", "barrier"), fence_barrier.barrier),
    "mbarrier": mbarrier.mbarrier,
    "cp": cp_async_bulk.copy,
    "tcgen05": tcgen05_mma.tcgen05,
    "wgmma": wgmma.wgmma,
}


def decoder_of(instruction: Instruction) -> Decoder:
    """The decoder of an instruction; PtxError when there is none."""
    words = instruction.words
    if words[0] in ("st", "red") and words[1:2] == ("async",):
        return st_async.remote_store
    if words[0] not in DECODERS:
        raise instruction.error(f"unknown instruction {words[0]}")
    return DECODERS[words[0]]
