"""Findings about a run, the log that collects them, and the errors that refuse a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from build_kernels.binaries.ptx.syntax import Instruction

TEXT_LIMIT = 160  # characters of an instruction that a finding quotes


class EmulatorError(ValueError):
    """The emulation was refused; nothing was executed."""


class PtxError(EmulatorError):
    """The PTX holds something that the emulator does not support; the message names the line."""


class LaunchError(EmulatorError):
    """The launch or its arguments do not fit the kernel."""


@dataclass(frozen=True, kw_only=True)
class Thread:
    """One thread. `lane` is None if a whole warp acted; `agent` names an asynchronous unit."""

    cta: tuple[int, int, int]
    warp: int
    lane: int | None = None
    agent: str = ""

    def __str__(self) -> str:
        place = f"cta {self.cta} warp {self.warp}"
        if self.lane is not None:
            place += f" lane {self.lane}"
        return f"{self.agent} issued by {place}" if self.agent else place


@dataclass(frozen=True, kw_only=True)
class Party:
    """The other side of a finding: the conflicting instruction and the thread that executed it."""

    line: int
    text: str
    thread: Thread | None = None

    def __str__(self) -> str:
        return f"line {self.line} `{self.text}`" + (f" by {self.thread}" if self.thread else "")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of the kernel, seen `count` times at this pair of lines.

    kind: a short stable word, e.g. "race"; message: the fault, in words;
    line, text: the PTX line (1-based) and its text; address: the location, with its memory's name.
    by_the_letter: the PTX ISA forbids it, but hardware or ptxas guards against its effect.
    """

    kind: str
    message: str
    line: int
    text: str
    thread: Thread | None = None
    address: str = ""
    other: Party | None = None
    count: int = 1
    by_the_letter: bool = False

    def __str__(self) -> str:
        kind = f"{self.kind} (by the letter)" if self.by_the_letter else self.kind
        parts = [f"{kind}: {self.message}", f"line {self.line} `{self.text}`"]
        if self.thread:
            parts.append(f"by {self.thread}")
        if self.address:
            parts.append(f"at {self.address}")
        if self.other:
            parts.append(f"against {self.other}")
        if self.count > 1:
            parts.append(f"({self.count} times)")
        return " ".join(parts)


class FindingLog:
    """Collect findings; one entry per (kind, line, other line), with a count.

    by_the_letter: collect those by the letter of the ISA too.
    """

    def __init__(self, *, by_the_letter: bool = True) -> None:
        self._found: dict[tuple[str, bool, int, int], Finding] = {}
        self._by_the_letter = by_the_letter

    def report(
        self,
        kind: str,
        message: str,
        *,
        instruction: Instruction,
        thread: Thread | None,
        address: str = "",
        other: Instruction | None = None,
        other_thread: Thread | None = None,
        by_the_letter: bool = False,
    ) -> None:
        """Add a finding, or count one more of its kind at these lines."""
        if by_the_letter and not self._by_the_letter:
            return
        line, text = instruction.line, instruction.text[:TEXT_LIMIT]
        key = (kind, by_the_letter, line, other.line if other else 0)
        if (seen := self._found.get(key)) is not None:
            self._found[key] = replace(seen, count=seen.count + 1)
            return
        party = None
        if other is not None:
            party = Party(line=other.line, text=other.text[:TEXT_LIMIT], thread=other_thread)
        self._found[key] = Finding(
            kind=kind,
            message=message,
            line=line,
            text=text,
            thread=thread,
            address=address,
            other=party,
            by_the_letter=by_the_letter,
        )

    def findings(self) -> tuple[Finding, ...]:
        return tuple(sorted(self._found.values(), key=lambda f: (f.line, f.kind)))


class Reporter(ABC):
    """A warp or an asynchronous operation: adds its instruction and thread to each finding.

    instruction: the present one. thread: names a lane, or the whole if there is none.
    """

    log: FindingLog
    instruction: Instruction

    @abstractmethod
    def thread(self, lane: int | None = None) -> Thread:
        """Return the identity of a lane, or of the whole."""

    def report(
        self,
        kind: str,
        message: str,
        *,
        lane: int | None = None,
        address: str = "",
        other: Instruction | None = None,
        other_thread: Thread | None = None,
        by_the_letter: bool = False,
    ) -> None:
        """Add a finding about the present instruction."""
        self.log.report(
            kind,
            message,
            instruction=self.instruction,
            thread=self.thread(lane),
            address=address,
            other=other,
            other_thread=other_thread,
            by_the_letter=by_the_letter,
        )
