"""Edits of the text that several classes of faults share."""

from __future__ import annotations

from build_kernels.mutants.mutant import Edit
from dsv4_router_runtime.parameters import ABI

# One mbarrier wait as the DSL writes it, and its test made always true.
WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, (\[[^\]]+\]), (%r\d+|\d+), 10000000;"
_NO_WAIT = "setp.eq.b32 P1, 0, 0;"
# Any arrival of a thread's own.
ARRIVE = r"mbarrier\.arrive\.shared\.b64[^;]*;"
_INIT = r"(mbarrier\.init\.shared\.b64 \t\[[^\]]+\], )%r\d+;"


def no_wait(nth: int) -> Edit:
    """Let the nth mbarrier wait pass at once."""
    return Edit(pattern=WAIT, replacement=_NO_WAIT, nth=nth)


def deleted(pattern: str, nth: int | None = None) -> Edit:
    """Delete every match, or the nth."""
    return Edit(pattern=pattern, replacement="", nth=nth)


def arrivals(count: int, nth: int) -> Edit:
    """Change the count of the nth mbarrier.init."""
    return Edit(pattern=_INIT, replacement=rf"\g<1>{count};", nth=nth)


def parameter_as(role: str, parameter: str, value: str) -> Edit:
    """Read a constant in place of a 32-bit parameter of a role's kernels."""
    index = [item.name for item in ABI[role]].index(parameter)
    return Edit(
        pattern=rf"ld\.param\.[buf]32( \t%[rf]\d+), \[\w+_param_{index}\];",
        replacement=rf"mov.b32\1, {value};",
    )


def pointer_off(role: str, parameter: str) -> Edit:
    """Read null in place of a pointer of a role's kernels."""
    index = [item.name for item in ABI[role]].index(parameter)
    return Edit(
        pattern=rf"ld\.param\.[bu]64( \t%rd\d+), \[\w+_param_{index}\];",
        replacement=r"mov.b64\1, 0;",
    )


def unchecked_token_id() -> Edit:
    """Look a token id up without the check that it is in the table."""
    return Edit(
        pattern=r"or\.pred \t(%p\d+), %p\d+, %p\d+;(\s+@%p\d+ bra[^;]*;\s+cvt\.[su]64[^;]*;"
        r"(?:\s+cvt[^;]*;)?\s+mad\.lo\.s64)",
        replacement=r"mov.pred \t\1, 0;\2",
    )
