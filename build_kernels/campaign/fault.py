"""One row of the fault campaign. Pure: imports neither NumPy nor the emulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from build_kernels.mutants.mutant import Edit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from build_kernels.evidence.inputs import Inputs

    Array = NDArray[Any]


class Expected(Enum):
    """The outcome that a fault must have."""

    REFUSED = "refused in words, before anything is launched or written"
    FALLBACK = "another step takes the call, visibly"
    RIGHT = "every row is right"
    WRONG_ROW_ONLY = "ends, no trace is left, and only the rows whose input was torn may differ"
    ENDS = "ends by the trap, or with every row right; never wrong in silence"
    LEAVES_ZERO = "every row is right, and the workspace is zero afterwards"


class Place(Enum):
    """The machine that a fault needs."""

    CPU = "cpu"
    GPU = "gpu"
    GPUS = "gpus"


# Changes of one array: flat index of an element -> new value.
Changes = Mapping[int, int | float]


@dataclass(frozen=True, kw_only=True)
class Torn:
    """Arrays that another stream rewrites at one moment. rows: those that may differ then."""

    rows: tuple[int, ...]
    arrays: Mapping[str, Changes]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A fault that the emulator can make, and the launches that it is made in.

    roles: kernels that it concerns. num_tokens, options, kind: fields of the cases; the number of
    tokens may depend on the kernel's token tile, and a hash kernel takes no images. experts, quick:
    the numbers of experts in a full and in a quick run, for CTAs of one expert tile. tears: makes
    the tear from the inputs. every_moment: tear at each load of a torn element; else, and in a
    quick run, at the moments 1, 4, 16, ... between: further numbers of experts, with one moment per
    number, in turn. contents: functions from zeros to initial contents of the workspace, a few
    launches each. edits: changes to the PTX, for a peer that misbehaves.
    """

    roles: tuple[str, ...] = ("decode",)
    num_tokens: int | Callable[[int], int] = 2
    options: tuple[str, ...] = ()
    kind: str = "integers"
    experts: tuple[int, ...] = (65, 128, 384)
    quick: tuple[int, ...] = (65,)
    tears: Callable[[Inputs], Torn] | None = None
    every_moment: bool = True
    between: tuple[int, ...] = ()
    contents: tuple[Callable[[Array], Array], ...] = ()
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row: one fault, its expected outcome and the proof of it.

    hazard: H1 .. H11 of the production contract, or "" for a fault beside that list. scenario: for
    the emulator, or else tests: the ids of the pytest nodes that show it.
    """

    name: str
    hazard: str
    what: str
    place: Place
    expected: Expected
    scenario: Scenario | None = None
    tests: tuple[str, ...] = field(default=())
