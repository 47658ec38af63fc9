"""Which function decodes which instruction."""

from __future__ import annotations

from collections.abc import Callable

from build_kernels.emulator.instructions import (
    addresses,
    arithmetic,
    atomics,
    bits,
    bulk_copy,
    collectives,
    conversion,
    mbarriers,
    remote_store,
    selection,
    synchronisation,
    tensor_core,
    transfers,
    wgmma,
)
from build_kernels.emulator.operands import Context
from build_kernels.emulator.syntax import Instruction
from build_kernels.emulator.warp import Outcome, Warp

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
    "setp": selection.set_predicate,
    "selp": selection.select,
    "mov": selection.move,
    "cvt": conversion.convert,
    **dict.fromkeys(("ld", "ldu"), transfers.load),
    "st": transfers.store,
    **dict.fromkeys(("atom", "red"), atomics.atomic),
    "cvta": addresses.convert_address,
    "mapa": addresses.map_address,
    "getctarank": addresses.rank_of_address,
    "isspacep": addresses.is_space,
    "prefetch": addresses.prefetch,
    "createpolicy": addresses.create_policy,
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
    **dict.fromkeys(("fence", "membar"), synchronisation.fence),
    **dict.fromkeys(("bar", "barrier"), synchronisation.barrier),
    "mbarrier": mbarriers.mbarrier,
    "cp": bulk_copy.copy,
    "tcgen05": tensor_core.tcgen05,
    "wgmma": wgmma.wgmma,
}


def decoder_of(instruction: Instruction) -> Decoder:
    """The decoder of an instruction; PtxError when there is none."""
    words = instruction.words
    if words[0] in ("st", "red") and words[1:2] == ("async",):
        return remote_store.remote_store
    if words[0] not in DECODERS:
        raise instruction.error(f"unknown instruction {words[0]}")
    return DECODERS[words[0]]
