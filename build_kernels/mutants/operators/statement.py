"""A statement of a kernel: its tokens, to change one by one, and the registers at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from build_kernels.binaries.ptx.syntax import Instruction, Register
from build_kernels.binaries.ptx.tokens import Token, tokenise
from build_kernels.emulator.execution.program import Program
from build_kernels.emulator.instructions.lookahead import live_registers, mentioned

AROUND = 10
_NO_RESULT = (
    *("st", "red", "bra", "bar", "barrier", "fence", "membar", "cp", "prefetch", "wgmma"),
    *("tcgen05", "griddepcontrol", "discard", "multimem", "setmaxnreg", "nanosleep"),
)


def writes_first(instruction: Instruction) -> bool:
    """Return whether an instruction writes its first operand and does not read it."""
    return instruction.words[0] not in _NO_RESULT


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One instruction as it stands in the text, without its semicolon.

    others: for a register, another one of its type that is written before and read after.
    registers: those of the instruction and these, by name. read_later: the names of those that a
    thread may read after this instruction. around: it with `>` before it, amid AROUND statements
    before and after, a line each.
    """

    instruction: Instruction
    text: str
    others: Mapping[str, str]
    registers: Mapping[str, Register]
    read_later: frozenset[str]
    around: str

    @cached_property
    def tokens(self) -> tuple[Token, ...]:
        return tuple(tokenise(self.text))

    @cached_property
    def opcode_at(self) -> int:
        """Return the place of the opcode among the tokens: after `@p` or `@!p`."""
        if self.instruction.guard is None:
            return 0
        return 3 if self.instruction.guard[1] else 2

    @property
    def bare(self) -> str:
        """Return the statement without its guard."""
        return self.text[self.tokens[self.opcode_at].start :]

    def operands(self) -> list[list[int]]:
        """Return the places of each operand's tokens, braces and brackets among them."""
        found: list[list[int]] = [[]]
        depth = 0
        for at in range(self.opcode_at + 1, len(self.tokens)):
            word = self.tokens[at].text
            depth += (word in "[{") - (word in "]}")
            if word == "," and depth == 0:
                found.append([])
            else:
                found[-1].append(at)
        return [places for places in found if places]

    def with_tokens(self, first: int, last: int, text: str) -> str:
        """Return the statement with other text for the tokens from `first` to `last`."""
        end = self.tokens[last].start + len(self.tokens[last].text)
        return self.text[: self.tokens[first].start] + text + self.text[end:]

    def with_opcode(self, words: Sequence[str]) -> str:
        return self.with_tokens(self.opcode_at, self.opcode_at, ".".join(words))


def statements_of(program: Program, ptx: str) -> Iterator[Statement]:
    """Yield the statements of a decoded kernel, in the order of its text."""
    live = live_registers(program.code)
    registers = program.kernel.registers
    spans = [step.instruction.span for step in program.code[:-1]]
    texts = [ptx[start : end - 1] for start, end in spans]
    lines = [" ".join(text.split()) for text in texts]
    # Those of an inner block have names of their own, which say nothing elsewhere.
    outer = sum(1 << register.index for register in registers if register.name.startswith("%"))
    written = 0
    for at, text in enumerate(texts):
        instruction = program.code[at].instruction
        own = set(mentioned(instruction.operands))
        if instruction.guard is not None:
            own.add(instruction.guard[0].index)
        at_hand = live[at + 1] & written & outer & ~sum(1 << index for index in own)
        others = {
            index: other
            for index in own
            if (other := _next(at_hand, registers[index], registers)) is not None
        }
        yield Statement(
            instruction=instruction,
            text=text,
            others={registers[i].name: registers[other].name for i, other in others.items()},
            registers={registers[i].name: registers[i] for i in (*own, *others.values())},
            read_later=frozenset(registers[i].name for i in own if live[at + 1] >> i & 1),
            around="\n".join(
                [*lines[max(at - AROUND, 0) : at], f">{lines[at]}", *lines[at + 1 :][:AROUND]]
            ),
        )
        written |= sum(1 << index for index in set(mentioned(instruction.operands[:1])))


def _next(bits: int, register: Register, registers: Sequence[Register]) -> int | None:
    """Return the nearest register of the same type among `bits`, the lower one of two."""
    for distance in range(1, len(registers)):
        for index in (register.index - distance, register.index + distance):
            if 0 <= index < len(registers) and bits >> index & 1:
                if registers[index].type == register.type:
                    return index
        if distance > register.index and register.index + distance >= len(registers):
            break
    return None
