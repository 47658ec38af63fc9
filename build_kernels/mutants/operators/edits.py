"""The operators: from a statement to the texts that take its place."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping

from build_kernels.binaries.ptx.syntax import TYPE_BITS

from .statement import Statement, writes_first

Operator = Callable[[Statement], Iterator[str]]

_COMPARISONS = {
    **{"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"},
    **{"lo": "ls", "ls": "lo", "hi": "hs", "hs": "hi"},
    **{"ltu": "leu", "leu": "ltu", "gtu": "geu", "geu": "gtu", "equ": "neu", "neu": "equ"},
}
_ORDERED = ("setp", "set", "min", "max")
_OTHER_ORDERS = {
    "acquire": "relaxed",
    "release": "relaxed",
    "acq_rel": "relaxed",
    "volatile": "",
}
_NARROWER = {"sys": "gpu", "gpu": "cta", "cluster": "cta"}
_BARRIERS = ("bar", "barrier")


def comparison(s: Statement) -> Iterator[str]:
    """Compare by the neighbour: lt for le, eq for ne."""
    words = s.instruction.words
    if words[0] in ("setp", "set") and words[1] in _COMPARISONS:
        yield s.with_opcode([words[0], _COMPARISONS[words[1]], *words[2:]])


def signedness(s: Statement) -> Iterator[str]:
    """Order signed numbers as unsigned ones, and the reverse."""
    *words, kind = s.instruction.words
    if words and words[0] in _ORDERED and words[1:2] not in (["eq"], ["ne"]):
        if kind[:1] in ("s", "u") and kind in TYPE_BITS:
            yield s.with_opcode([*words, {"s": "u", "u": "s"}[kind[0]] + kind[1:]])


def immediate(s: Statement) -> Iterator[str]:
    """Add 1 to a literal and subtract it; an address moves by the size of its access."""
    words, places = s.instruction.words, s.operands()
    for number, operand in enumerate(places):
        if is_count(s, number) or (words[0] == "shfl" and number == 2):
            continue
        offset = len(operand) > 3 and [s.tokens[at].text for at in operand[2::2]] == ["+", "]"]
        step = _access_bytes(words) if offset else 1
        for at in operand:
            if s.tokens[at].kind == "number":
                yield from _moved(s, at, step)


def count(s: Statement) -> Iterator[str]:
    """Expect one arrival, or one byte of a transaction, more or less; of a barrier a warp."""
    words, places = s.instruction.words, s.operands()
    for number, operand in enumerate(places):
        if not is_count(s, number):
            continue
        at = operand[0]
        step = 32 if words[0] in _BARRIERS else 1
        if s.tokens[at].kind == "number":
            yield from _moved(s, at, step)
        else:
            for change in (step, -step):
                yield _computed(s, at, f"add.s32 changed, {s.tokens[at].text}, {change}")


def swap(s: Statement) -> Iterator[str]:
    """Swap the operands of a selp; take max for min."""
    words, places = s.instruction.words, s.operands()
    if words[0] == "selp" and len(places) == 4:
        first, second = (
            s.text[s.tokens[p[0]].start : s.tokens[p[-1]].start + len(s.tokens[p[-1]].text)]
            for p in places[1:3]
        )
        yield s.with_tokens(places[1][0], places[2][-1], f"{second}, {first}")
    other = {"min": "max", "max": "min"}
    if any(word in other for word in words):
        yield s.with_opcode([other.get(word, word) for word in words])


def no_guard(s: Statement) -> Iterator[str]:
    """Execute whatever the predicate says."""
    if s.instruction.guard is not None:
        yield s.bare


def other_guard(s: Statement) -> Iterator[str]:
    """Execute where the predicate says not to."""
    if s.instruction.guard is not None:
        register, negated = s.instruction.guard
        yield f"@{'' if negated else '!'}{register.name} {s.bare}"


def dropped(s: Statement) -> Iterator[str]:
    """Leave the instruction out."""
    if not is_fence(s):
        yield ""


def no_fence(s: Statement) -> Iterator[str]:
    """Leave a fence out."""
    if is_fence(s):
        yield ""


def lane(s: Statement) -> Iterator[str]:
    """Shuffle from the neighbour of the lane."""
    if s.instruction.words[0] == "shfl":
        at = s.operands()[2][0]
        token = s.tokens[at]
        if token.kind == "number":
            yield s.with_tokens(at, at, str(int(token.text, 0) ^ 1))
        else:
            yield _computed(s, at, f"xor.b32 changed, {token.text}, 1")


def register(s: Statement) -> Iterator[str]:
    """Read another register of the type that is in use."""
    places = s.operands()
    results = int(writes_first(s.instruction))
    for number, operand in enumerate(places):
        is_address = s.tokens[operand[0]].text == "["
        if number < results and not is_address:
            continue
        for at in operand:
            if (other := s.others.get(s.tokens[at].text)) is not None:
                yield s.with_tokens(at, at, other)


def order(s: Statement) -> Iterator[str]:
    """Order less: relaxed for acquire and release, a weak access for a relaxed one."""
    words = s.instruction.words
    if words[:3] == ("barrier", "cluster", "arrive") and len(words) == 3:
        yield s.with_opcode([*words, "relaxed"])
    for at, word in enumerate(words):
        if words[0] == "fence" or word not in (*_OTHER_ORDERS, "relaxed"):
            continue
        if word == "relaxed" and words[0] in ("ld", "st"):
            yield s.with_opcode([w for w in words if w != word and w not in (*_NARROWER, "cta")])
        elif word != "relaxed":
            other = _OTHER_ORDERS[word]
            yield s.with_opcode([*words[:at], *([other] if other else []), *words[at + 1 :]])


def scope(s: Statement) -> Iterator[str]:
    """Order within a narrower scope."""
    words = s.instruction.words
    for at, word in enumerate(words):
        if word in _NARROWER and words[0] not in _BARRIERS:
            yield s.with_opcode([*words[:at], _NARROWER[word], *words[at + 1 :]])


OPERATORS: Mapping[str, Operator] = {
    "comparison": comparison,
    "signedness": signedness,
    "immediate": immediate,
    "count": count,
    "swap": swap,
    "no-guard": no_guard,
    "other-guard": other_guard,
    "dropped": dropped,
    "no-fence": no_fence,
    "lane": lane,
    "register": register,
    "order": order,
    "scope": scope,
}


def is_fence(s: Statement) -> bool:
    """Return whether all that an instruction does is to order others."""
    words = s.instruction.words
    return words[0] in ("fence", "membar") or words[1:2] == ("fence",)


def is_count(s: Statement, operand: int) -> bool:
    """Return whether an operand counts arrivals or bytes that a barrier expects."""
    words = s.instruction.words
    if words[0] == "mbarrier":
        at = {"init": 1, "arrive": 2, "expect_tx": 1, "complete_tx": 1}.get(words[1])
        return operand == at
    if words[0] in _BARRIERS and words[1:2] not in (("cluster",), ("warp",)):
        return operand == 1
    return False


def _moved(s: Statement, at: int, step: int) -> Iterator[str]:
    """Yield the statement with a literal that is `step` more, and `step` less."""
    first = at - 1 if s.tokens[at - 1].text == "-" else at
    word = s.tokens[at].text
    for change in (step, -step):
        if word[:2].lower() in ("0f", "0d"):
            text = _moved_float(word, change)
        else:
            value = int(word.rstrip("U"), 0)
            text = str((-value if first < at else value) + change)
            if s.tokens[first - 1].text == "+" and text.startswith("-"):
                continue  # an offset below the register
        yield s.with_tokens(first, at, text)


def _moved_float(word: str, change: int) -> str:
    """Return a bit pattern's literal for a value that is 1 more or less, if it is finite."""
    integer, float_, digits = ("<I", "<f", 8) if word[1] in "fF" else ("<Q", "<d", 16)
    (value,) = struct.unpack(float_, struct.pack(integer, int(word[2:], 16)))
    if not math.isfinite(value):
        return word
    (bits,) = struct.unpack(integer, struct.pack(float_, value + change))
    return f"{word[:2]}{bits:0{digits}X}"


def _computed(s: Statement, at: int, compute: str) -> str:
    """Return a block that computes the operand at a token before the statement."""
    return "{ .reg .b32 changed; " + f"{compute}; {s.with_tokens(at, at, 'changed')}; }}"


def _access_bytes(words: tuple[str, ...]) -> int:
    bits = next((TYPE_BITS[word] for word in reversed(words) if word in TYPE_BITS), 8)
    vector = next((int(word[1:]) for word in words if word in ("v2", "v4", "v8")), 1)
    return max(1, bits // 8) * vector
