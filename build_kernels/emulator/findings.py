"""What the emulator reports: findings about a run, and errors that refuse one."""

from __future__ import annotations

from dataclasses import dataclass, replace


class EmulatorError(ValueError):
    """The emulation was refused; nothing was executed."""


class PtxError(EmulatorError):
    """The PTX holds something the emulator does not know; the message names the line."""


class LaunchError(EmulatorError):
    """The launch or its arguments do not fit the kernel."""


@dataclass(frozen=True, kw_only=True)
class Thread:
    """One thread. `lane` is None when a whole warp acted; `agent` names an asynchronous unit."""

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
    """The other side of a finding: the instruction that conflicts and who executed it."""

    line: int
    text: str
    thread: Thread | None = None

    def __str__(self) -> str:
        return f"line {self.line} `{self.text}`" + (f" by {self.thread}" if self.thread else "")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of the kernel, seen `count` times at this pair of lines.

    kind: a short stable word, e.g. "race"; message: what happened, for a reader;
    line, text: the PTX line (1-based) and its text; address: where, with its memory named.
    """

    kind: str
    message: str
    line: int
    text: str
    thread: Thread | None = None
    address: str = ""
    other: Party | None = None
    count: int = 1

    def __str__(self) -> str:
        parts = [f"{self.kind}: {self.message}", f"line {self.line} `{self.text}`"]
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
    """Collects findings; one entry per (kind, line, other line), with a count."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int, int], Finding] = {}

    def add(self, finding: Finding) -> None:
        key = (finding.kind, finding.line, finding.other.line if finding.other else 0)
        seen = self._found.get(key)
        if seen is None:
            self._found[key] = finding
        else:
            self._found[key] = replace(seen, count=seen.count + finding.count)

    def findings(self) -> tuple[Finding, ...]:
        """All findings, by PTX line."""
        return tuple(sorted(self._found.values(), key=lambda f: (f.line, f.kind)))
