"""Access records: one int64 that names an access by tick, actor, scope and instruction.

An actor is a thread or an asynchronous agent; its tick counts its actions.
"""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.lanes import Ints

# Scopes of strong operations, in a record's two bits; 0 is a weak access.
WEAK, CTA_SCOPE, CLUSTER_SCOPE, GPU_SCOPE = range(4)

_INSTRUCTION_BITS, _SCOPE_BITS, _ACTOR_BITS = 16, 2, 22
_ACTOR_AT = _INSTRUCTION_BITS + _SCOPE_BITS
_TICK_AT = _ACTOR_AT + _ACTOR_BITS
# Where a record has its scope; all ones for GPU_SCOPE.
SCOPE_FIELD = 3 << _INSTRUCTION_BITS
_ACTOR_MASK = (1 << _ACTOR_BITS) - 1


def pack(tick: int, actor: int | Ints, scope: int, instruction: int) -> Ints:
    """Pack an access, or one per actor, into int64."""
    same = tick << _TICK_AT | scope << _INSTRUCTION_BITS | instruction
    return (np.asarray(actor, dtype=np.int64) << _ACTOR_AT) | same


def actors_of(records: Ints) -> Ints:
    return (records >> _ACTOR_AT) & _ACTOR_MASK


def ticks_of(records: Ints) -> Ints:
    return records >> _TICK_AT


def actor_of(one: int) -> int:
    return (one >> _ACTOR_AT) & _ACTOR_MASK


def tick_of(one: int) -> int:
    return one >> _TICK_AT


def scope_of(one: int) -> int:
    return (one >> _INSTRUCTION_BITS) & 3


def instruction_of(one: int) -> int:
    return one & 0xFFFF
