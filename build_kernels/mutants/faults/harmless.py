"""Changes that do no harm, each with its proof; every rung accepts them."""

from __future__ import annotations

from dataclasses import replace

from build_kernels.mutants.mutant import Edit

from .edits import deleted
from .kernels import TWO_TILES, WRAPS, sm100

DECODE = (
    *(
        sm100(name, "harmless", edit, rejected_by=(), case=WRAPS, harmless=proof)
        for name, edit, proof in (
            (
                "no tcgen05.relinquish_alloc_permit",
                deleted(r"tcgen05\.relinquish_alloc_permit[^;]*;"),
                "it only takes the CTA's right to allocate again, and the kernel allocates once. "
                "Others' allocations wait for free columns alone: a CTA takes 32 to 64 of 512, and "
                "shared memory lets no more than two be on one SM",
            ),
            (
                "no griddepcontrol.launch_dependents",
                deleted(r"griddepcontrol\.launch_dependents;"),
                "the end of a CTA has the same effect: the next grid starts later, and it waits "
                "for this one's end in any case before it touches this one's outputs",
            ),
            (
                "no prefetch.tensormap",
                deleted(r"prefetch\.tensormap[^;]*;"),
                "a prefetch fills a cache and nothing else",
            ),
            (
                "no .collector::a::discard",
                deleted(r"\.collector::a::discard"),
                "it is the default of tcgen05.mma if no collector usage is written",
            ),
            (
                "no time limit on mbarrier.try_wait",
                Edit(pattern=r"(mbarrier\.try_wait[^;]*), 10000000;", replacement=r"\1;"),
                "the limit bounds the sleep of one try, and each try is in a loop that ends "
                "when the phase has",
            ),
        )
    ),
    sm100(
        *("no griddepcontrol.wait in the epilogue", "harmless"),
        deleted(r"griddepcontrol\.wait;", 2),
        rejected_by=(),
        case=replace(TWO_TILES, options=("images", "padding")),
        harmless="an epilogue warp touches memory of the grid before after its wait for "
        "row_flags_full, and that warp's lanes arrive there after their griddepcontrol.wait",
    ),
)
