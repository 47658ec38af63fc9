"""Faults in foreign GEMMs: one instruction of a compiled kernel changed, by kind of fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One change of a kernel's text: `ptx` has `new` in place of `old`.

    number: among the kernel's faults of its kind. line: from 1.
    """

    kind: str
    number: int
    line: int
    old: str
    new: str
    ptx: str

    @property
    def name(self) -> str:
        return f"{self.kind} {self.number}"

    def comparison(self) -> str | None:
        """Return the kernel with a trap where `new` computes another value than `old` does.

        None if the change is not one of a register's value."""
        change = re.fullmatch(r"\s*[a-z]+(?:\.\w+)* \s*(%[rp]\d+), ([^;]*);", self.new)
        if change is None or not re.match(rf"\s*[a-z]+(?:\.\w+)* \s*{change[1]},", self.old):
            return None
        at = change.start(1)
        other = self.new[:at] + "Q" + self.new[change.end(1) :]
        differs = f"xor.pred P, Q, {change[1]};" if change[1][1] == "p" else (
            f"setp.ne.b32 P, Q, {change[1]};"
        )  # fmt: skip
        kind = "pred" if change[1][1] == "p" else "b32"
        both = f"{{.reg .{kind} Q; .reg .pred P; {other} {self.old} {differs} @P trap;}}"
        lines = self.ptx.split("\n")
        return "\n".join([*lines[: self.line - 1], both, *lines[self.line :]])


_WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, (\[[^\]]+\]), (%r\d+|\d+), 10000000;"
_PEEK = r"mbarrier\.try_wait\.parity\.acquire\.cta\.shared::cta\.b64 \s*(%p\d+), [^;]+;"
_TMA = r"(cp\.async\.bulk\.tensor\.\dd\.shared::[^;]*\[%rd\d+, \{)"
_STORE = r"(cp\.async\.bulk\.tensor\.\dd\.global[^;]*\[%rd\d+, \{)"


def _added(by: int) -> Callable[[re.Match[str]], str]:
    """Return a replacement that adds to the match's second group, between the first and third."""
    return lambda match: f"{match[1]}{int(match[2]) + by}{match[3]}"


def _half_the_columns(match: re.Match[str]) -> str:
    """Halve the N of an instruction descriptor: bits 17 to 22, in eights."""
    descriptor = int(match[2])
    columns = descriptor >> 17 & 63
    return f"mov.b32 {match[1]}, {descriptor - (columns - columns // 2 << 17)};"


KINDS = (
    ("wait dropped", _WAIT, "setp.eq.b32 P1, 0, 0;"),
    ("wait for the other parity", _WAIT,
     r"{.reg .b32 Q; xor.b32 Q, \2, 1; mbarrier.try_wait.parity.shared.b64 P1, \1, Q, 10000000;}"),
    ("peek taken as done", _PEEK, r"setp.eq.b32 \1, 0, 0;"),
    ("phase never turned", r"xor\.b32 (\s*%r\d+, %r\d+), %r\d+;", r"mov.b32 \1;"),
    ("tcgen05 commit dropped", r"tcgen05\.commit[^;]*;", ""),
    ("arrival dropped", r"mbarrier\.arrive\.shared[^;]*;", ""),
    ("expect_tx dropped", r"mbarrier\.arrive\.expect_tx[^;]*;", ""),
    ("expect_tx without its bytes",
     r"mbarrier\.arrive\.expect_tx\.shared\.b64 (%rd\d+, \[[^\]]+\]), %r\d+;",
     r"mbarrier.arrive.shared.b64 \1, 1;"),
    ("16 bytes more expected",
     r"(mbarrier\.arrive\.expect_tx[^;]*), (%r\d+);", r"add.s32 \2, \2, 16; \1, \2;"),
    ("16 bytes less expected",
     r"(mbarrier\.arrive\.expect_tx[^;]*), (%r\d+);", r"sub.s32 \2, \2, 16; \1, \2;"),
    ("one arrival more needed", r"(mbarrier\.init[^;]*), (%r\d+);",
     r"{.reg .b32 Q; add.s32 Q, \2, 1; \1, Q;}"),
    ("mbarrier.init dropped", r"mbarrier\.init[^;]*;", ""),
    ("mbarrier fence dropped", r"fence\.mbarrier_init[^;]*;", ""),
    ("proxy fence dropped", r"fence\.proxy\.async[^;]*;", ""),
    ("bar.sync dropped", r"bar\.sync[^;]*;", ""),
    ("bar.sync of one warp less", r"(bar\.sync \s*\d+, )(\d+)(;)", _added(-32)),
    ("cluster arrival dropped", r"barrier\.cluster\.arrive[^;]*;", ""),
    ("cluster wait dropped", r"barrier\.cluster\.wait[^;]*;", ""),
    ("accumulate flag turned", r"(tcgen05\.mma[^;]*), (%p\d+);",
     r"{.reg .pred Q; not.pred Q, \2; \1, Q;}"),
    ("descriptor of another swizzle", r"(or\.b64 \s*%rd\d+, %rd\d+, )(\d+)(;)", _added(1 << 62)),
    ("instruction descriptor of another N",
     r"selp\.b32 (\s*%r\d+), \d{9}, (\d{9}), [^;]*;", _half_the_columns),
    ("offset dropped", r"add\.s32 \s*(%r\d+), (?!\1,)(%r\d+), \d+;", r"mov.b32 \1, \2;"),
    ("shift one less", r"(shl\.b32 \s*%r\d+, %r\d+, )(\d+)(;)", _added(-1)),
    ("bound one less", r"(setp\.\w+\.[us]32 \s*%p\d+, %r\d+, )([1-9]\d*)(;)", _added(-1)),
    ("turn one early", r"(setp\.(?:eq|ne)\.b32 \s*%p\d+, %r\d+, )([1-9]\d*)(;)", _added(-1)),
    ("turn one late", r"(setp\.(?:eq|ne)\.b32 \s*%p\d+, %r\d+, )([1-9]\d*)(;)", _added(1)),
    ("roles taken for each other", r"(setp\.(?:eq|ne)\.b32 \s*%p\d+, %r\d+, )(0)(;)", _added(1)),
    ("load's coordinates swapped", _TMA + r"(%r\d+), (%r\d+)", r"\1\3, \2"),
    ("store's coordinates swapped", _STORE + r"(%r\d+), (%r\d+)", r"\1\3, \2"),
    ("load announced to the next mbarrier",
     r"(cp\.async\.bulk\.tensor[^;]*complete_tx[^;]*\}\], \[%r\d+)(\])", r"\1+8\2"),
    ("load 128 bytes aside",
     r"(cp\.async\.bulk\.tensor[^;]*complete_tx[^;]* \[%r\d+\+)(\d+)(\], \[%rd)", _added(128)),
    ("load dropped", r"cp\.async\.bulk\.tensor[^;]*complete_tx[^;]*;", ""),
    ("multicast to CTA 0 alone",
     r"(cp\.async\.bulk\.tensor[^;]*\], )%rs\d+(, %rd\d+;)", r"\g<1>1\2"),
    ("commit to CTA 0 alone", r"(tcgen05\.commit[^;]*\], )%rs\d+;", r"\g<1>1;"),
    ("store dropped", r"cp\.async\.bulk\.tensor\.\dd\.global[^;]*;", ""),
    ("bulk commit dropped", r"cp\.async\.bulk\.commit_group;", ""),
    ("bulk wait dropped", r"cp\.async\.bulk\.wait_group[^;]*;", ""),
    ("by every lane", r"elect\.sync \s*%r\d+\|(%p\d+), -1;", r"setp.eq.b32 \1, 0, 0;"),
    ("rank of the other CTA", r"(mapa\.shared::cluster\.u32 \s*%r\d+, %r\d+), (%r\d+);",
     r"{.reg .b32 Q; xor.b32 Q, \2, 1; \1, Q;}"),
    ("TMEM of half the columns", r"(tcgen05\.alloc[^;]*), (%r\d+);",
     r"{.reg .b32 Q; shr.u32 Q, \2, 1; \1, Q;}"),
    ("tcgen05 dealloc dropped", r"tcgen05\.dealloc[^;]*;", ""),
    ("permit kept", r"tcgen05\.relinquish[^;]*;", ""),
    ("tcgen05 MMA dropped", r"tcgen05\.mma[^;]*;", ""),
    ("cancelled taken for not", r"(clusterlaunchcontrol[^;]*is_canceled\S* \s*)(%p\d+)([^;]*;)",
     r"\1\2\3 not.pred \2, \2;"),
    ("CTA y taken for x", r"get_first_ctaid::x", "get_first_ctaid::y"),
    ("try_cancel dropped", r"clusterlaunchcontrol\.try_cancel[^;]*;", ""),
    ("wgmma fence dropped", r"wgmma\.fence[^;]*;", ""),
    ("wgmma commit dropped", r"wgmma\.commit_group[^;]*;", ""),
    ("wgmma wait of one group more", r"(wgmma\.wait_group[^;]*\t)(\d)(;)", _added(1)),
    ("wgmma zeroes", r"setp\.ne\.b32 p, %r\d+, 0;", "setp.ne.b32 p, 0, 0;"),
    ("swizzle left out", r"xor\.b32 (\s*%r\d+), %r\d+, (%r\d+);", r"mov.b32 \1, \2;"),
    ("lane's output aside", r"(st\.(?:shared|global)[^;]*\[%r[d\d]+\+)(\d+)(\])", _added(16)),
    ("TMEM column aside", r"(tcgen05\.ld[^;]*\[%r\d+)(\])", r"\1+16\2"),
)  # fmt: skip


def faults(ptx: str) -> Iterator[Fault]:
    """Yield every fault of every kind that the text has a place for."""
    lines = ptx.split("\n")
    for kind, pattern, replacement in KINDS:
        number = 0
        for at, line in enumerate(lines):
            if line.lstrip().startswith((".", "//")):
                continue
            new = re.sub(pattern, replacement, line, count=1)
            if new != line:
                changed = "\n".join([*lines[:at], new, *lines[at + 1 :]])
                yield Fault(kind=kind, number=number, line=at + 1, old=line, new=new, ptx=changed)
                number += 1


def picked(ptx: str, seed: int) -> list[Fault]:
    """Return one fault per kind that the text has a place for; `seed` varies the places."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults(ptx):
        kinds.setdefault(fault.kind, []).append(fault)
    return [each[(5 * seed + 3) % len(each)] for each in kinds.values()]
