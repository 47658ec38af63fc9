"""Blocks: elementwise instructions that follow one another, run as one Python function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.instructions.decoding import Source
from build_kernels.emulator.instructions.elementwise import Elementwise, same
from build_kernels.emulator.lanes import ALL

LEAST = 2  # instructions of a block
MOST = 12  # so that the end of a turn leaves few of them to run one by one

Function = Callable[[Warp], bool]


class Block:
    """The instructions from one on, up to the next that is not elementwise or has a label.

    length: their number. last: the last of them. function: made at the first use.
    """

    def __init__(self, parts: Sequence[Elementwise], last: Instruction) -> None:
        self.length = len(parts)
        self.last = last
        self._parts = parts

    @cached_property
    def function(self) -> Function:
        return _compile(self._parts)

    def run(self, w: Warp) -> bool:
        """Do what the instructions do, one after another.

        False, with nothing done, if one may meet poison or a pending register."""
        if not self.function(w):
            return False
        w.instruction = self.last
        return True


class _Text:
    """The text of a block's function while it is written, and the objects that it names."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.read: dict[int, None] = {}
        self.written: dict[int, str] = {}
        self.lines: list[str] = []

    def name(self, thing: Any) -> str:
        """Return the name of an object."""
        name = f"n{id(thing)}"
        self.names[name] = thing
        return name

    def source(self, source: Source) -> str:
        """Return an expression of an operand's values."""
        if source.values is not None:
            return self.name(source.values)
        if not source.registers:
            return f"{self.name(source.get)}(w)"
        (register,) = source.registers
        value = self.written.get(register)
        if value is None:
            self.read[register] = None
            value = f"r[{register}]"
        return value if source.convert is None else f"{self.name(source.convert)}({value})"

    def add(self, part: Elementwise) -> None:
        """Add the lines of an instruction."""
        if part.collective:
            self.lines.append(f"if w.observed: w.meet({ALL})")
        sources = ", ".join([self.source(source) for source in part.sources])
        value = sources if part.compute is same else f"{self.name(part.compute)}({sources})"
        targets = [f"v{len(self.lines)}_{i}" for i in range(len(part.targets))]
        self.lines.append(f"{', '.join(targets)} = {value}")
        for name, target in zip(targets, part.targets, strict=True):
            if target.convert is not None:
                self.lines.append(f"{name} = {self.name(target.convert)}({name})")
            if target.register >= 0:
                self.written[target.register] = name


def _compile(parts: Sequence[Elementwise]) -> Function:
    """Return a function that runs the instructions on a warp; False for one that it leaves."""
    text = _Text()
    for part in parts:
        text.add(part)
    clean = " is ".join([*(f"t[{register}]" for register in text.read), "None"])
    kept = " is ".join([*(f"t[{register}]" for register in text.written), "None"])
    whole = any(part.collective for part in parts)
    body = [
        f"if w.bits != {ALL}: return False" if whole else "",
        "t = w.t",
        f"if not ({clean}): return False" if text.read else "",
        # A lane that is not active keeps its poison.
        f"partial = w.bits != {ALL}",
        f"if partial and not ({kept}): return False",
        "r = w.r",
        *text.lines,
        "if partial:",
        *(f"    w.put({register}, {name}, None)" for register, name in text.written.items()),
        "    return True",
        *(f"r[{register}] = {name}" for register, name in text.written.items()),
        *(f"t[{register}] = None" for register in text.written),
        "return True",
    ]
    source = "def function(w):\n" + "\n".join(f"    {line}" for line in body if line)
    exec(compile(source, "<block>", "exec"), text.names)
    function: Function = text.names["function"]
    return function


def blocks_of(runs: Sequence[Any], instructions: Sequence[Instruction]) -> list[Block | None]:
    """Return the block that starts at each instruction, or None; runs: what each one does."""
    labels = {instruction.target for instruction in instructions}
    blocks: list[Block | None] = [None] * len(runs)
    start = 0
    for at in range(len(runs) + 1):
        joins = at < len(runs) and isinstance(runs[at], Elementwise)
        joins = joins and instructions[at].guard is None
        if joins and at not in labels and at - start < MOST:
            continue
        if at - start >= LEAST:
            blocks[start] = Block(runs[start:at], instructions[at - 1])
        start = at if joins else at + 1
    return blocks
