"""Tokens of PTX text, and a cursor over them."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from build_kernels.binaries.ptx.syntax import Immediate, UnsupportedPtx

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+) | (?P<newline>\n) | (?P<comment>//[^\n]*|/\*.*?\*/)
    | (?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?
                |\d+\.\d*(?:[eE][+-]?\d+)?|\d+U?)
    | (?P<string>"[^"\n]*")
    | (?P<name>[%$A-Za-z_.][\w$%.]*(?:::[\w.]+)*)
    | (?P<punct>[-+{}\[\](),;:|!@=<>*])""",
    re.VERBOSE | re.DOTALL,
)

_BIT_PATTERNS = {"0f": ("<I", "<f"), "0d": ("<Q", "<d")}


class Token(NamedTuple):
    """One token; `kind` is "number", "string", "name" or "punct", `start` its place in the text."""

    text: str
    kind: str
    line: int
    start: int


def tokenise(text: str) -> list[Token]:
    tokens, line, end = [], 1, 0
    for match in _TOKEN.finditer(text):
        at, word, kind = match.start(), match.group(), match.lastgroup
        if at != end:
            break
        end += len(word)
        if kind in ("newline", "comment"):
            line += word.count("\n")
        elif kind != "space":
            tokens.append(Token(word, kind or "", line, at))
    if end != len(text):
        raise UnsupportedPtx(f"PTX line {line}: unreadable text {text[end : end + 20]!r}")
    return tokens


class TokenCursor:
    """Step through the tokens of a text."""

    def __init__(self, text: str) -> None:
        self.at = 0
        self._lines = text.split("\n")
        self._tokens = tokenise(text)

    @property
    def line(self) -> int:
        return self._tokens[min(self.at, len(self._tokens) - 1)].line if self._tokens else 1

    @property
    def ended(self) -> bool:
        return self.at >= len(self._tokens)

    def error(self, why: str, line: int | None = None) -> UnsupportedPtx:
        return UnsupportedPtx(f"PTX line {self.line if line is None else line}: {why}")

    def peek(self, ahead: int = 0) -> str:
        index = self.at + ahead
        return self._tokens[index].text if index < len(self._tokens) else ""

    def at_number(self) -> bool:
        return not self.ended and self._tokens[self.at].kind == "number"

    def next(self) -> str:
        if self.ended:
            raise self.error("the text ends inside a statement")
        self.at += 1
        return self._tokens[self.at - 1].text

    def expect(self, text: str) -> None:
        line = self.line
        if (got := self.next()) != text:
            raise self.error(f"expected {text!r} (got {got!r})", line)

    def accept(self, text: str) -> bool:
        if self.peek() == text:
            self.at += 1
            return True
        return False

    def integer(self) -> int:
        negative = self.accept("-")
        line, word = self.line, self.next()
        try:
            value = int(word.rstrip("U"), 0)
        except ValueError:
            raise self.error(f"expected an integer (got {word!r})", line) from None
        return -value if negative else value

    def literal(self) -> Immediate:
        negative = self.accept("-")
        line, word = self.line, self.next()
        if word[:2].lower() in _BIT_PATTERNS:
            integer, float_ = _BIT_PATTERNS[word[:2].lower()]
            bits = int(word[2:], 16)
            return Immediate(struct.unpack(float_, struct.pack(integer, bits))[0], bits)
        try:
            value = float(word) if "." in word else int(word.rstrip("U"), 0)
        except ValueError:
            raise self.error(f"expected a literal (got {word!r})", line) from None
        return Immediate(-value if negative else value)

    def span(self, start: int) -> tuple[int, int]:
        """Return where a statement lies in the text: from a token to the one just read."""
        last = self._tokens[self.at - 1]
        return self._tokens[start].start, last.start + len(last.text)

    def source(self, start: int) -> str:
        """Return the source lines from a token to the one before the next, on one line."""
        first = self._tokens[start].line
        last = self._tokens[self.at - 1].line
        return " ".join(" ".join(self._lines[first - 1 : last]).split())
