"""What SentryWard cannot follow in a kernel's PTX, and the text that it gets instead."""

from __future__ import annotations

import re
from dataclasses import dataclass

from build_kernels.evidence.artifact import null_pointers
from dsv4_router_runtime.artifacts.kernel import Kernel


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """A change of SentryWard's input text, and why the proof still applies to the kernel.

    Every match of the regular expression `pattern` becomes `replacement`. There must be a match.
    """

    pattern: str
    replacement: str
    why: str


NO_COLLECTOR = Rewrite(
    pattern=r"\.collector::a::discard",
    replacement="",
    why="`.collector::a::discard` of tcgen05.mma deleted: it is the PTX default",
)
# SentryWard has no atomics, and no order of global accesses but barriers'.
NO_TICKET = Rewrite(
    pattern=r"atom\.relaxed\.gpu\.global\.inc\.u32 (%r\d+), \[%rd\d+\], %r\d+;",
    replacement=r"mov.u32 \1, 0;",
    why="with several expert tiles every ticket is 0 and no warp merges: who merges, when, and "
    "what it reads is the emulator's to check",
)
# The same for a kernel in which one owner merges its own tiles too: no ticket is the last one.
NO_MERGE = Rewrite(
    pattern=r"(ld\.shared\.b32 \t(%r\d+), \[[^;]*;(?:\s+and\.b32 \t%r\d+, \2, 7;)?"
    r"(?:\s+mov[^;]*%nctaid\.y;\s+add\.s32[^;]*, -1;)?\s+setp\.ne\.b32 \t%p\d+, )%r\d+(, %r\d+;)",
    replacement=r"\g<1>7\3",
    why="the candidates of a token are in the workspace, and no warp merges: who merges, when, and "
    "what it reads and stores is the emulator's to check",
)
# A trap's predicate is read from memory, and a control predicate has to be static.
NO_TRAP = Rewrite(
    pattern=r"@fault trap;",
    replacement="",
    why="no trap is taken: it would end the launch with an error",
)
# SentryWard takes it for a read.
NO_PREFETCH = Rewrite(
    pattern=r"@is_published prefetch\.global\.L2 \[%rd\d+\];",
    replacement="",
    why="a prefetch of global memory reads and writes no value",
)
# The branch to the loop for equal keys depends on the keys.
NO_TIES = Rewrite(
    pattern=r"(vote\.sync\.ballot\.b32 \t(%r\d+), %p\d+, -1;\s+)or\.b32( \t%r\d+), \2, %r\d+;",
    replacement=r"\1mov.b32\3, 0;",
    why="no key stands twice: the loop that decides ties accesses no memory and no barrier",
)
OPTIONS_ARE_OFF = "every option is off: their pointers are null, in the text"
DECLARED_POINTERS = "router_topk's 64-bit parameters are pointers, and declared so, in the text"
SAMPLED_CANDIDATES = (
    "router_topk's candidates and their ranks are constants: the addresses in shared memory are "
    "proven disjoint for these alone, and all others are the emulator's to check"
)


def sampled_candidates(slot: int) -> tuple[Rewrite, ...]:
    """Return the rewrites that give each lane of router_topk one candidate, of `slot`."""
    ballot = r"vote\.sync\.ballot\.b32 \t(%r\d+), [^;]*;"
    pairs = (
        # A lane's candidates, their number, and the lanes whose number has bit 0 set.
        (
            r"popc\.b32 \t(%r\d+), (%r\d+);(\s+and\.b32 [^;]*, \1, 1;\s+setp[^;]*;\s+)" + ballot,
            rf"mov.b32 \2, {1 << slot}; mov.b32 \1, 1;\3mov.b32 \4, -1;",
        ),
        (
            r"(shr\.u32[^;]*;\s+and\.b32 [^;]*, 1;\s+setp[^;]*;\s+)" + ballot,
            r"\1mov.b32 \2, 0;",
        ),
        # How many of these lanes are lower, and how many there are.
        (
            r"(mov\.b32 (%r\d+), -1;\s+and\.b32[^;]*;\s+)popc\.b32 \t(%r\d+), %r\d+;"
            r"(\s+)popc\.b32 \t(%r\d+), \2;",
            r"\1mov.u32 \3, %laneid;\4mov.b32 \5, 32;",
        ),
        (
            r"(mov\.b32 (%r\d+), 0;\s+and\.b32[^;]*;\s+)popc\.b32 \t(%r\d+), %r\d+;"
            r"((?:(?!popc)[^;]*;)*?\s+)popc\.b32 \t(%r\d+), \2;",
            r"\1mov.b32 \3, 0;\4mov.b32 \5, 0;",
        ),
        (
            r"brev\.b32 [^;]*;(\s+)bfind\.shiftamt\.u32 \t(%r\d+), [^;]*;",
            rf"\1mov.b32 \2, {slot};",
        ),
        # The expert that is read back from shared memory becomes an address of read-only data.
        (r"(ld\.shared\.u16 \t(%rs\d+), [^;]*;)", r"\1 mov.u16 \2, 5;"),
        (
            r"(ld\.shared\.u32[^;]*;\s+ld\.shared\.u32 \t(%r\d+), [^;]*;)",
            r"\1 mov.u32 \2, 5;",
        ),
        # The first value of a candidate's rank, and the increment per better candidate.
        (
            r"selp\.b32 \t(%r\d+), 32, 0, %p\d+;",
            r"mov.u32 \1, %laneid; xor.b32 \1, \1, 8;",
        ),
        (r"selp\.u32 \t(%r\d+), 1, 0, %p\d+;(\s+add\.s32)", r"mov.u32 \1, 0;\2"),
    )
    return tuple(
        Rewrite(pattern=pattern, replacement=replacement, why=SAMPLED_CANDIDATES)
        for pattern, replacement in pairs
    )


# Both loads give addresses of read-only data, and decide branches.
SAMPLED_TOKEN = Rewrite(
    pattern=r"ld\.global\.s32(\s+%rd\d+), \[%rd\d+\];",
    replacement=r"mov.b64\1, 3;",
    why="a token's id is a constant: every row is of one token, which is in the table",
)
SAMPLED_EXPERT = Rewrite(
    pattern=r"(mad\.lo\.s64[^;]*;\s+shl\.b64[^;]*, 2;\s+add\.s64[^;]*;\s+)"
    r"ld\.global\.b32(\s+%r\d+), \[%rd\d+\];",
    replacement=r"\1mov.b32\2, 5;",
    why="an expert from the table is a constant: every read of W_gate is of one row",
)


def rewrites_for(kernel: Kernel, *, slot: int = 0) -> tuple[Rewrite, ...]:
    """Return the rewrites of a kernel's PTX that SentryWard needs; slot: of router_topk alone."""
    # SentryWard takes every pointer argument for an object, never for null.
    nulls = tuple(
        Rewrite(
            pattern=rf"ld\.param\.[bu]64(\s+%rd\d+), \[{kernel.symbol}_param_{index}\];",
            replacement=r"mov.b64\1, 0;",
            why=OPTIONS_ARE_OFF,
        )
        for index, parameter in enumerate(kernel.parameters)
        if parameter.name in null_pointers(kernel)
    )
    if kernel.role == "hash":
        return (NO_COLLECTOR, SAMPLED_TOKEN, SAMPLED_EXPERT, *nulls)
    gate = (NO_COLLECTOR, NO_TRAP, NO_TIES, NO_PREFETCH)
    if kernel.role == "decode":
        return (*gate, *nulls)
    if kernel.role == "prefill":
        return (*gate, NO_TICKET, NO_MERGE, *nulls)
    pointers = Rewrite(
        pattern=rf"\.param \.u64 (?:\.ptr \.align 1 )?({kernel.symbol}_param_\d+)",
        replacement=r".param .u64 .ptr .align 1 \1",
        why=DECLARED_POINTERS,
    )
    return (*sampled_candidates(slot), pointers, *nulls)


class ProtocolError(Exception):
    """A kernel or case that SentryWard's input cannot express."""


def rewritten(ptx: str, rewrites: tuple[Rewrite, ...]) -> str:
    """Return the text for SentryWard, with the same line numbers.

    ProtocolError if a rewrite matches nothing, so that no rewrite becomes stale.
    """
    for rewrite in rewrites:
        ptx, count = re.subn(rewrite.pattern, rewrite.replacement, ptx)
        if count == 0:
            raise ProtocolError(f"the rewrite {rewrite.pattern!r} matches nothing in the PTX")
    return ptx
