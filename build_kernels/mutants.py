"""Proof that the checks can fail: faults put into the project's own PTX, and who rejects them.

A mutant changes the text of a built kernel. It is rejected by the emulated rung when a run has a
finding, wrong ids or weights, or is refused; by the protocol rung when SentryWard names a fault.
A mutant that both accept must carry the proof that it does no harm.

    python -m build_kernels.mutants [--rung emulated] [--rung protocol] [--only NAME] [--json]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .verify import emulated, protocol
from .verify.artifact import Artifact, load_artifact
from .verify.evidence import FAILED, NOT_RUN, PASSED

RUNGS = ("emulated", "protocol")
SCHEDULES = (("latest", 0), ("earliest", 0), ("random", 1), ("random", 2))

# The rings have 6 and 8 blocks of K, in stages of 1 and 4, so that 9 blocks a CTA use a stage again
# and end in a chunk that is not full.
BLOCKS_OF_A_WRAP = 9
BLOCK_K = 64 * 16

_SM100 = "router_decode_kmajor_n16.sm_100a"
_SM100_EMAJOR = "router_decode_emajor_n64.sm_100a"
_SM90 = "router_decode_kmajor_n16.sm_90a"
_TOPK = "router_topk.sm_100a"

# Bits of a shared-memory descriptor and of an instruction descriptor, as sm_100 has them.
_SWIZZLE_SHIFT = 61
_STRIDE_SHIFT = 32
_TRANSPOSE_A = 1 << 15


class MutantError(Exception):
    """A mutant whose pattern is not in the kernel any more: it has to be written anew."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of the text: every match of `pattern`, or the one numbered `nth` from 0."""

    pattern: str
    replacement: str | Callable[[re.Match], str]
    nth: int | None = None

    def __call__(self, ptx: str) -> str:
        matches = list(re.finditer(self.pattern, ptx))
        chosen = matches if self.nth is None else matches[self.nth : self.nth + 1]
        if not chosen:
            raise MutantError(f"match {self.nth} of {self.pattern!r} is not in the PTX")
        pieces, end = [], 0
        for match in chosen:
            new = self.replacement
            pieces += [ptx[end : match.start()], new(match) if callable(new) else match.expand(new)]
            end = match.end()
        return "".join(pieces) + ptx[end:]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault.

    kind: its class. edits: to the PTX. maps: fields of tensor maps to change, by parameter.
    case: what it is run on. rejected_by: the rungs that must reject it, as measured; a rung that is
    left out was measured to accept it or cannot be asked. harmless: the proof, for a mutant that
    every rung rightly accepts.
    """

    name: str
    kind: str
    artifact: str
    rejected_by: tuple[str, ...]
    edits: tuple[Edit, ...] = ()
    maps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    case: emulated.Case
    harmless: str = ""


def _decode_case(experts: int = 60, blocks: int = BLOCKS_OF_A_WRAP) -> emulated.Case:
    return emulated.Case(num_tokens=7, num_experts=experts, top_k=6, k=BLOCK_K * blocks)


_WRAPS = _decode_case()
_ONE_BLOCK = _decode_case(blocks=1)
_TWO_TILES = _decode_case(experts=100, blocks=1)
_TIES = replace(_ONE_BLOCK, kind="ties")
_TOPK_CASE = emulated.Case(num_tokens=7, num_experts=132, top_k=6)

# One mbarrier wait as the DSL writes it; its test made always true.
_WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, (\[[^\]]+\]), (%r\d+|\d+), 10000000;"
_NO_WAIT = "setp.eq.b32 P1, 0, 0;"


def _no_wait(nth: int) -> tuple[Edit, ...]:
    return (Edit(pattern=_WAIT, replacement=_NO_WAIT, nth=nth),)


def _deleted(pattern: str, nth: int | None = None) -> tuple[Edit, ...]:
    return (Edit(pattern=pattern, replacement="", nth=nth),)


def _in_descriptor(change: Callable[[int], int], nth: int) -> tuple[Edit, ...]:
    """Change the constant part of the nth shared-memory descriptor: 0 hidden_states, 1 W_gate."""

    def changed(match: re.Match) -> str:
        return f"{match[1]}{change(int(match[2]))};"

    pattern = r"(or\.b64\s+%rd\d+, %rd\d+, )(4611\d{15});"
    return (Edit(pattern=pattern, replacement=changed, nth=nth),)


def _swizzle_64b(descriptor: int) -> int:
    return descriptor & ~(7 << _SWIZZLE_SHIFT) | 4 << _SWIZZLE_SHIFT


def _half_stride(descriptor: int) -> int:
    stride = descriptor >> _STRIDE_SHIFT & 0x3FFF
    return descriptor & ~(0x3FFF << _STRIDE_SHIFT) | stride // 2 << _STRIDE_SHIFT


def _transposed(match: re.Match) -> str:
    return f"{match[1]}{int(match[2]) ^ _TRANSPOSE_A};"


def _score_with_bias(match: re.Match) -> str:
    """Keep the biased sum where the score was kept for the weight."""
    return match[0].replace(f"selp.f32 \t{match['kept']}, {match['score']}", _kept_biased(match))


def _kept_biased(match: re.Match) -> str:
    return f"selp.f32 \t{match['kept']}, {match['biased']}"


_BIASED_SCORE = (
    r"add\.f32 \t(?P<biased>%r\d+), %r\d+, (?P<score>%r\d+);(?:[^;]*;){2,24}?"
    r"\s*selp\.f32 \t(?P<kept>%r\d+), (?P=score), 0f00000000"
)


def _mutants() -> Iterator[Mutant]:
    both = RUNGS
    emulator = ("emulated",)

    def sm100(
        name: str, kind: str, rejected_by: tuple[str, ...], edits: tuple[Edit, ...], **more: Any
    ) -> Mutant:
        return Mutant(
            **{
                "name": name,
                "kind": kind,
                "artifact": _SM100,
                "rejected_by": rejected_by,
                "edits": edits,
                "case": _WRAPS,
                **more,
            }
        )

    yield sm100("producer does not wait for empty", "dropped wait", both, _no_wait(0))
    yield sm100("MMA does not wait for full", "dropped wait", both, _no_wait(1))
    yield sm100("epilogue does not wait for the accumulator", "dropped wait", both, _no_wait(2))
    yield sm100("owner does not wait for the sums", "dropped wait", both, _no_wait(3))

    commit = r"tcgen05\.commit[^;]*;"
    yield sm100("no commit to empty", "dropped commit", both, _deleted(commit, 0))
    yield sm100("no commit to accumulator_full", "dropped commit", both, _deleted(commit, 1))

    flipped = Edit(pattern=r"not\.b32( \t%r\d+, %r\d+;\s+and\.b32 \t%r\d+, %r\d+, 1;)",
                   replacement=r"mov.b32\1", nth=0)  # fmt: skip
    yield sm100("producer waits for the other parity", "wrong parity", both, (flipped,))
    constant = Edit(pattern=_WAIT.replace(r"(%r\d+|\d+)", r"(%r\d+)"),
                    replacement=r"mbarrier.try_wait.parity.shared.b64 P1, \1, 0, 10000000;",
                    nth=1)  # fmt: skip
    yield sm100("MMA waits for parity 0 in every turn", "wrong parity", both, (constant,))
    accumulator = Edit(pattern=r"(mbarrier\.try_wait[^;]*), 0, 10000000;",
                       replacement=r"\1, 1, 10000000;", nth=0)  # fmt: skip
    yield sm100("epilogue waits for parity 1", "wrong parity", both, (accumulator,))

    expected = r"(add\.s32 \t%r\d+, %r\d+, )8192;(\s+mbarrier\.arrive\.expect_tx)"
    few = Edit(pattern=expected, replacement=r"\g<1>4096;\2", nth=0)
    many = Edit(pattern=expected, replacement=r"\g<1>8208;\2", nth=1)
    yield sm100("first turn expects 4096 bytes less", "wrong tx-count", both, (few,))
    yield sm100("later turns expect 16 bytes more", "wrong tx-count", both, (many,))
    sums = Edit(pattern=r"(shl\.b32 \t%r\d+, %r\d+, )13;(\s+mbarrier\.arrive\.expect_tx)",
                replacement=r"\g<1>12;\2", nth=0)  # fmt: skip
    yield sm100("owner expects half of the sums", "wrong tx-count", both, (sums,))

    init = r"(mbarrier\.init\.shared\.b64 \t\[[^\]]+\], )%r\d+;"
    yield sm100(
        "full needs two arrivals", "wrong arrive count", both,
        (Edit(pattern=init, replacement=r"\g<1>2;", nth=0),),
    )  # fmt: skip
    yield sm100(
        "empty needs two arrivals", "wrong arrive count", both,
        (Edit(pattern=init, replacement=r"\g<1>2;", nth=1),),
    )  # fmt: skip

    yield sm100(
        "no fence after mbarrier.init", "missing proxy fence", emulator,
        _deleted(r"fence\.mbarrier_init\.release\.cluster;"), case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        "no tcgen05.fence::after_thread_sync", "missing tcgen05 fence", emulator,
        _deleted(r"tcgen05\.fence::after_thread_sync;"), case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        "no tcgen05.wait::ld", "missing wait::ld", emulator,
        _deleted(r"tcgen05\.wait::ld\.sync\.aligned;"), case=_ONE_BLOCK,
    )  # fmt: skip

    x_stage = Edit(pattern=r"(shl\.b32 \t%r\d+, )%r\d+(, 13;\s+add\.s32 \t%r\d+, %r\d+, %r\d+;\s+"
                   r"shl\.b32 \t%r\d+, %r\d+, 2;)", replacement=r"\g<1>0\g<2>")  # fmt: skip
    yield sm100("hidden_states always into stage 0", "stage off by one", both, (x_stage,))
    mma_stage = Edit(pattern=r"and\.b32 (\t%r\d+, %r\d+, 1;\s+shl\.b32 \t%r\d+, %r\d+, 3;)",
                     replacement=r"xor.b32 \1", nth=0)  # fmt: skip
    yield sm100("MMA reads the other stage", "stage off by one", both, (mma_stage,))

    yield sm100(
        "hidden_states descriptor with 64B swizzle", "wrong descriptor swizzle", emulator,
        _in_descriptor(_swizzle_64b, 0), case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        "W_gate descriptor with 64B swizzle", "wrong descriptor swizzle", emulator,
        _in_descriptor(_swizzle_64b, 1), case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        "hidden_states descriptor with half the stride", "wrong descriptor stride", emulator,
        _in_descriptor(_half_stride, 0), case=replace(_ONE_BLOCK, num_tokens=16),
    )  # fmt: skip
    yield sm100(
        "W_gate descriptor with half the stride", "wrong descriptor stride", emulator,
        _in_descriptor(_half_stride, 1), case=_ONE_BLOCK,
    )  # fmt: skip
    step = Edit(pattern=r"(add\.s32 \t%r\d+, %r\d+, )2;", replacement=r"\g<1>4;", nth=0)
    yield sm100(
        "second K step of hidden_states reads the third's bytes", "wrong descriptor start",
        emulator, (step,), case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        "instruction descriptor says W_gate is MN-major", "wrong instruction descriptor",
        emulator, (Edit(pattern=r"(mov\.b32 \t%r\d+, )(67372176);", replacement=_transposed),),
        case=_ONE_BLOCK,
    )  # fmt: skip
    accumulate = Edit(pattern=r"setp\.ne\.b32 \t(%p\d+), %r\d+, 0;(\s+mov\.b32[^;]*;\s+mov\.b32"
                      r"[^;]*;\s+tcgen05\.mma)", replacement=r"mov.pred \t\1, -1;\2")  # fmt: skip
    yield sm100(
        "first MMA accumulates onto what TMEM held", "wrong accumulate flag", emulator,
        (accumulate,), case=_ONE_BLOCK,
    )  # fmt: skip
    guard = Edit(pattern=r"setp\.ge\.s32 \t(%p\d+), (%r\d+), %r\d+;(\s+@%p\d+ bra[^;]*;\s+shl\.b32"
                 r" \t%r\d+, %r\d+, 11;\s+add\.s32)", replacement=r"mov.pred \t\1, 0;\3",
                 nth=1)  # fmt: skip
    yield sm100(
        "a ragged chunk multiplies a block that was not loaded", "stale block", emulator,
        (guard,),
    )  # fmt: skip

    lane = Edit(pattern=r"(shl\.b32 \t%r\d+, %r\d+, )16;(\s+and\.b32 \t%r\d+, %r\d+, 14680064;)",
                replacement=r"\g<1>17;\2")  # fmt: skip
    yield sm100(
        "tcgen05.ld of another warp's lanes", "wrong TMEM lane", emulator, (lane,),
        case=_ONE_BLOCK,
    )  # fmt: skip
    column = Edit(pattern=r"(tcgen05\.ld\.sync[^;]*\[%r\d+)\];", replacement=r"\1+8];")
    yield sm100(
        "tcgen05.ld eight columns on", "wrong TMEM column", emulator, (column,), case=_ONE_BLOCK
    )

    yield sm100(
        "hidden_states box of two blocks", "wrong tensor-map box", both, (),
        maps={"x_map": {"box": (64, 16, 2)}},
    )  # fmt: skip
    yield sm100(
        "W_gate map without swizzle", "wrong tensor-map swizzle", emulator, (),
        maps={"w_map": {"swizzle": "none"}}, case=_ONE_BLOCK,
    )  # fmt: skip

    yield sm100(
        "dealloc before all warps have read", "early dealloc", both,
        _deleted(r"bar\.sync \t1, 128;"), case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        "no dealloc", "missing dealloc", emulator, _deleted(r"tcgen05\.dealloc[^;]*;"),
        case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        "no cluster barrier", "missing cluster barrier", both,
        _deleted(r"barrier\.cluster\.(arrive\.relaxed|wait);"), case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        # SentryWard takes the relaxed cluster barrier for one that orders memory.
        "no CTA barrier after setup", "missing CTA barrier", emulator,
        _deleted(r"bar\.sync \t0;"), case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        "hidden_states loaded before the grid dependency", "missing grid dependency", emulator,
        _deleted(r"griddepcontrol\.wait;", 0), case=_ONE_BLOCK,
    )  # fmt: skip
    yield sm100(
        "ticket drawn before the grid dependency", "missing grid dependency", emulator,
        _deleted(r"griddepcontrol\.wait;", 1), case=_TWO_TILES,
    )  # fmt: skip
    rank = Edit(pattern=r"(mapa\.shared::cluster\.u32 \t%r\d+, %r\d+, )(%r\d+);",
                replacement=r"\g<1>0;", nth=0)  # fmt: skip
    yield sm100(
        "sums sent to rank 0, completed at the owner", "wrong cluster rank", emulator, (rank,),
        case=_ONE_BLOCK,
    )  # fmt: skip

    ties = Edit(pattern=r"setp\.gt\.u32( \t%p\d+, %r\d+, %r\d+;\s+setp\.eq\.b32)",
                replacement=r"setp.ge.u32\1", nth=0)  # fmt: skip
    yield sm100(
        "equal keys go to the higher register", "tie rule reversed", emulator, (ties,), case=_TIES
    )
    bias = Edit(pattern=_BIASED_SCORE, replacement=_score_with_bias)
    yield sm100(
        "the weight keeps the bias", "bias in the weight", emulator, (bias,), case=_ONE_BLOCK
    )
    yield sm100(
        "no ticket is drawn", "election", emulator,
        (Edit(pattern=r"atom\.relaxed\.gpu\.global\.inc\.u32 (%r\d+), (\[%rd\d+\]), %r\d+;",
              replacement=r"ld.relaxed.gpu.global.u32 \1, \2;"),),
        case=_TWO_TILES,
    )  # fmt: skip
    yield sm100(
        "the merger leaves its entries behind", "scratch not zeroed", emulator,
        _deleted(r"st\.relaxed\.gpu\.global\.v2\.b64 \[%rd\d+\], \{0, 0\};"), case=_TWO_TILES,
    )  # fmt: skip

    yield Mutant(
        name="emajor, 64 tokens: producer does not wait for empty",
        kind="dropped wait",
        artifact=_SM100_EMAJOR,
        rejected_by=both,
        edits=_no_wait(0),
        case=_WRAPS,
    )
    yield Mutant(
        name="emajor: instruction descriptor says W_gate is K-major",
        kind="wrong instruction descriptor",
        artifact=_SM100_EMAJOR,
        rejected_by=emulator,
        edits=(Edit(pattern=r"(mov\.b32 \t%r\d+, )(6\d{7}|7\d{7});", replacement=_transposed),),
        case=_ONE_BLOCK,
    )

    def sm90(name: str, kind: str, edits: tuple[Edit, ...], case: emulated.Case = _WRAPS) -> Mutant:
        return Mutant(
            name=name, kind=kind, artifact=_SM90, rejected_by=emulator, edits=edits, case=case
        )

    yield sm90("sm_90: producer does not wait for empty", "dropped wait", _no_wait(0))
    yield sm90("sm_90: warpgroup does not wait for full", "dropped wait", _no_wait(1))
    yield sm90(
        "sm_90: no arrival on empty", "dropped arrive",
        _deleted(r"mbarrier\.arrive\.shared\.b64[^;]*;"),
    )  # fmt: skip
    yield sm90(
        "sm_90: no wgmma.wait_group at the end", "missing wgmma wait",
        _deleted(r"wgmma\.wait_group\.sync\.aligned \t0;"),
    )  # fmt: skip
    yield sm90(
        "sm_90: stage freed while its wgmma still runs", "missing wgmma wait",
        (Edit(pattern=r"(wgmma\.wait_group\.sync\.aligned \t)1;", replacement=r"\g<1>2;"),),
    )  # fmt: skip
    yield sm90(
        "sm_90: no wgmma.fence", "missing wgmma fence", _deleted(r"wgmma\.fence\.sync\.aligned;")
    )

    def topk(
        name: str, kind: str, rejected_by: tuple[str, ...], edit: Edit, **more: Any
    ) -> Mutant:
        return Mutant(
            **{
                "name": name,
                "kind": kind,
                "artifact": _TOPK,
                "rejected_by": rejected_by,
                "edits": (edit,),
                "case": _TOPK_CASE,
                **more,
            }
        )

    yield topk(
        # Lanes of a warp run in step in the emulator.
        "top-k: no barrier between writing keys and reading them", "missing warp barrier",
        ("protocol",),
        Edit(pattern=r"bar\.warp\.sync[^;]*;", replacement=""),
    )  # fmt: skip
    yield topk(
        "top-k: equal keys go to the higher expert", "tie rule reversed", emulator,
        Edit(pattern=r"redux\.sync\.min\.u32", replacement="redux.sync.max.u32"),
        case=replace(_TOPK_CASE, kind="ties"),
    )  # fmt: skip
    yield topk(
        "top-k: logits read before the grid dependency", "missing grid dependency", emulator,
        Edit(pattern=r"griddepcontrol\.wait;", replacement=""),
    )  # fmt: skip


MUTANTS = tuple(_mutants())


REJECTED = "rejected"
ACCEPTED = "accepted"
UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one rung said of one mutant.

    word: rejected, accepted, or undecided where the tool cannot follow the kernel. reason: its
    first complaint, or why it has none.
    """

    mutant: str
    rung: str
    word: str
    reason: str


def mutated(mutant: Mutant, ptx: str) -> str:
    """The kernel's text with the fault in it; MutantError if the kernel has outgrown the mutant."""
    for edit in mutant.edits:
        try:
            ptx = edit(ptx)
        except MutantError as error:
            raise MutantError(f"{mutant.name}: {error}") from None
    return ptx


def judge(mutant: Mutant, artifact: Artifact, rung: str) -> Verdict:
    """Ask one rung about one mutant."""
    ptx = mutated(mutant, artifact.ptx)
    verdict = _emulate if rung == "emulated" else _prove
    word, reason = verdict(mutant, replace(artifact, ptx=ptx))
    return Verdict(mutant=mutant.name, rung=rung, word=word, reason=reason)


def _emulate(mutant: Mutant, artifact: Artifact) -> tuple[str, str]:
    from .emulator import EmulatorError, Schedule

    inputs = emulated.make_inputs(artifact.kernel, mutant.case)
    for policy, seed in SCHEDULES:
        schedule = Schedule(policy=policy, seed=seed)
        try:
            outcome = emulated.run(
                artifact.kernel, artifact.ptx, inputs, schedule, tensor_map_changes=mutant.maps
            )
        except EmulatorError as error:
            return REJECTED, f"refused: {error}"
        if outcome.problems:
            return REJECTED, f"{policy} {seed}: {outcome.problems[0]}"
    return ACCEPTED, f"no complaint under {len(SCHEDULES)} schedules"


def _prove(mutant: Mutant, artifact: Artifact) -> tuple[str, str]:
    case = protocol.Case(
        num_tokens=mutant.case.num_tokens,
        num_experts=mutant.case.num_experts,
        top_k=mutant.case.top_k,
        k=mutant.case.k,
        rewrites=protocol.rewrites_for(artifact.kernel),
    )
    result = protocol.prove(artifact, (case,), tensor_map_changes=mutant.maps)
    words = {PASSED: ACCEPTED, FAILED: REJECTED, NOT_RUN: UNDECIDED}
    return words[result.status], result.reason or "race_free"


def _judge_one(folder: Path, mutant: int, rung: str) -> Verdict:
    """One verdict, in a process of the pool."""
    chosen = MUTANTS[mutant]
    try:
        return judge(chosen, load_artifact(folder, chosen.artifact), rung)
    except MutantError as error:
        return Verdict(mutant=chosen.name, rung=rung, word=UNDECIDED, reason=str(error))


@click.command("mutants")
@click.option(
    "--rung", "rungs", multiple=True, type=click.Choice(RUNGS), help="Ask only this rung."
)
@click.option("--only", multiple=True, help="Only mutants whose name contains this; repeatable.")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path("artifacts"),
    show_default=True,
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def mutants_command(
    rungs: tuple[str, ...], only: tuple[str, ...], artifacts: Path, jobs: int, as_json: bool
) -> None:
    """Put known faults into the built PTX and show which rung rejects each.

    Asks each mutant's own rungs, the ones that have to reject it, or the rungs given for all.
    """
    chosen = [
        index
        for index, mutant in enumerate(MUTANTS)
        if not only or any(part in mutant.name for part in only)
    ]
    asked = [
        (index, rung)
        for index in chosen
        for rung in rungs or RUNGS
        if rungs or rung in MUTANTS[index].rejected_by
    ]
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        futures = [pool.submit(_judge_one, artifacts, index, rung) for index, rung in asked]
        verdicts = [future.result() for future in futures]
    rows: list[dict[str, Any]] = [
        {
            "mutant": mutant.name,
            "class": mutant.kind,
            "artifact": mutant.artifact,
            "rejected_by": list(mutant.rejected_by),
            "verdicts": {
                verdict.rung: {"word": verdict.word, "reason": verdict.reason}
                for verdict in verdicts
                if verdict.mutant == mutant.name
            },
            "harmless": mutant.harmless,
        }
        for mutant in (MUTANTS[index] for index in chosen)
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(mutant_table(rows))
    missed = [
        (row["mutant"], rung)
        for row in rows
        for rung in row["rejected_by"]
        if rung in row["verdicts"] and row["verdicts"][rung]["word"] != REJECTED
    ]
    for name, rung in missed:
        print(f"not rejected by {rung}: {name}", file=sys.stderr)
    if missed:
        sys.exit(1)


def mutant_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each mutant, one column for each rung."""
    table = Table("mutant", "class", "kernel", *RUNGS)
    for row in rows:
        cells = []
        for rung in RUNGS:
            verdict = row["verdicts"].get(rung)
            shown = f"{verdict['word']}: {verdict['reason'][:70]}" if verdict else "not asked"
            cells.append(escape(shown))
        table.add_row(row["mutant"], row["class"], row["artifact"], *cells)
    return table


if __name__ == "__main__":
    mutants_command()
