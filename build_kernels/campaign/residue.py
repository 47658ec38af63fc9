"""Words that a fault left in the workspace, and a peer that never publishes its candidates.

A kernel finds its workspace zero, unless memory was remapped, a neighbour wrote there, or a launch
before was killed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from build_kernels.kernels.shapes import MAX_EXPERTS, workspace_bytes
from build_kernels.mutants.mutant import Edit

from .fault import Expected, Fault, Place, Scenario

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

ROLES = ("decode", "prefill")
# Words of the first tokens' candidates.
CANDIDATES = 2 * 128
# The word of a padded row, and a key that would be taken, with score 1.0.
STRANGERS = (0xFFFF_FFFF_0000_0000, 0xFFFF_0000_3F80_0000)
# A candidate's store; the merger clears with .v2.
SILENT = (Edit(pattern=r"st\.relaxed\.gpu\.global\.b64 [^;]*;", replacement=""),)


def with_words(zeros: Array, *, words: slice, value: int) -> Array:
    """Return the workspace with some 8-byte words of its candidates set."""
    import numpy as np

    # A ticket and MAX_EXPERTS candidates per token: see kernels/shapes.py.
    tokens = zeros.nbytes // workspace_bytes(1)
    candidates = np.zeros(tokens * MAX_EXPERTS, np.uint64)
    candidates[words] = value
    tickets = np.zeros(tokens, np.uint32)
    return np.concatenate([tickets.view(np.uint8), candidates.view(np.uint8)]).view(zeros.dtype)


def with_ticket(zeros: Array, *, ticket: int) -> Array:
    """Return the workspace with the ticket counter of the first token set."""
    import numpy as np

    changed = zeros.copy()
    changed.view(np.uint32)[0] = ticket
    return changed


def filled(zeros: Array, *, byte: int) -> Array:
    """Return the workspace with every byte the same."""
    import numpy as np

    return np.full(zeros.nbytes, byte, np.uint8).view(zeros.dtype)


def random(zeros: Array, *, seed: int) -> Array:
    """Return the workspace with random bytes."""
    import numpy as np

    raw = np.random.default_rng(seed).integers(0, 256, zeros.nbytes, np.uint8)
    return raw.view(zeros.dtype)


def left(
    name: str, what: str, *contents: Callable[[Array], Array], edits: tuple[Edit, ...] = ()
) -> Fault:
    """Return a row of the table."""
    return Fault(
        name=name,
        hazard="H2",
        what=what,
        place=Place.CPU,
        expected=Expected.ENDS,
        scenario=Scenario(roles=ROLES, contents=contents, experts=(65,), edits=edits),
    )


RESIDUE = (
    left(
        "word-left",
        "one candidate word",
        *(
            partial(with_words, words=slice(word, word + 1), value=STRANGERS[word % 2])
            for word in range(0, CANDIDATES, 37)
        ),
    ),
    left(
        "row-left",
        "every candidate, and owners that come too late",
        *(partial(with_words, words=slice(None), value=value) for value in STRANGERS),
        edits=SILENT,
    ),
    left(
        "ticket-left",
        "a ticket counter off by one, by more, and negative",
        *(partial(with_ticket, ticket=ticket) for ticket in (1, 2, 77, 2**32 - 1)),
    ),
    left("ones-left", "every byte 1, and 255", *(partial(filled, byte=b) for b in (1, 255))),
    left("random-left", "random bytes", *(partial(random, seed=seed) for seed in range(3))),
    Fault(
        name="silent-peer",
        hazard="H1",
        what="a CTA that never publishes its candidates",
        place=Place.CPU,
        expected=Expected.ENDS,
        scenario=Scenario(roles=ROLES, edits=SILENT, experts=(65,)),
    ),
)

NAN = Fault(
    name="nan",
    hazard="",
    what="an expert's weights NaN, and a row of hidden_states infinite",
    place=Place.CPU,
    expected=Expected.LEAVES_ZERO,
    scenario=Scenario(roles=(*ROLES, "hash", "select"), num_tokens=3, kind="nan"),
)
