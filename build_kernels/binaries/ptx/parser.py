"""PTX text -> kernels: parameters, variables, registers and a flat list of instructions.

The grammar is that of the PTX ISA's chapters "Syntax" and "State Spaces, Types, and Variables", as
far as CuTeDSL and NVRTC emit it. Any other text raises UnsupportedPtx with its line.
"""

from __future__ import annotations

from functools import lru_cache

from build_kernels.binaries.ptx.body import BodyReader
from build_kernels.binaries.ptx.declarations import read_parameter, read_variable
from build_kernels.binaries.ptx.syntax import Kernel, UnsupportedPtx, Variable
from build_kernels.binaries.ptx.tokens import TokenCursor

_LINKAGE = (".visible", ".weak", ".extern", ".common")
_DIRECTIVES = (
    ".reqntid", ".maxntid", ".minnctapersm", ".maxnreg", ".reqnctapercluster",
    ".explicitcluster", ".maxclusterrank", ".blocksareclusters",
)  # fmt: skip


# Several schedules run one text: parsing it is a quarter of a small run's time.
@lru_cache(maxsize=4)
def parse(text: str, kernel: str | None = None) -> Kernel:
    """Parse the module and return its kernel, which callers of the same text share.

    kernel: the entry's name; may be None if the module has exactly one entry.
    Raises UnsupportedPtx for text that cannot be read, or if the entry cannot be chosen.
    """
    entries = parse_module(text)
    names = [entry.name for entry in entries]
    if kernel is None:
        if len(entries) != 1:
            raise UnsupportedPtx(f"the module must hold one .entry (got {names}); name the kernel")
        return entries[0]
    for entry in entries:
        if entry.name == kernel:
            return entry
    raise UnsupportedPtx(f"no .entry {kernel!r} in the module (it holds {names})")


def parse_module(text: str) -> list[Kernel]:
    """Parse the module and return its kernels, each with the module's variables."""
    cursor = TokenCursor(text)
    kernels: list[Kernel] = []
    variables: list[Variable] = []
    target = ""
    while not cursor.ended:
        line, word = cursor.line, cursor.next()
        if word in (".version", ".address_size"):
            cursor.next()
        elif word == ".target":
            if target:
                raise cursor.error("a second .target", line)
            target = cursor.next()
            while cursor.accept(","):
                cursor.next()
        elif word in _LINKAGE or word == ";":
            continue
        elif word == ".entry":
            kernels.append(_read_entry(cursor, target, line))
        elif word in (".shared", ".global", ".const"):
            variables.append(read_variable(cursor, word[1:], line))
        elif word in (".file", ".section"):
            raise cursor.error(f"debug directive {word} is not supported", line)
        else:
            raise cursor.error(f"unknown module directive {word!r}", line)
    for kernel in kernels:
        kernel.variables = variables + kernel.variables
    return kernels


def _read_entry(cursor: TokenCursor, target: str, line: int) -> Kernel:
    kernel = Kernel(cursor.next(), target, line)
    if cursor.accept("("):
        while not cursor.accept(")"):
            kernel.parameters.append(read_parameter(cursor, kernel.parameter_bytes))
            cursor.accept(",")
    while cursor.peek() != "{":
        word = cursor.next()
        if word not in _DIRECTIVES:
            raise cursor.error(f"unknown kernel directive {word!r}")
        numbers = []
        while cursor.at_number():
            numbers.append(cursor.integer())
            cursor.accept(",")
        kernel.directives[word[1:]] = tuple(numbers)
    BodyReader(cursor, kernel).read()
    return kernel
