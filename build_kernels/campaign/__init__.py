"""The fault campaign: what happens around a kernel or the runtime, and what must come of it.

    build-kernels faults [--list] [--only ID] [--json]

`table.FAULTS` is the list. Each row names the hazard, the fault, the machine that it needs and the
expected outcome. A row of `tears` or `residue` runs in the emulator on the PTX as it was built;
`build-kernels verify --rung faults` keeps its results with the other evidence. Any other row is
proved by the tests that it names. `guards` lists the parts of the kernels that rows depend on, each
with the edit that removes it.

`mutants/` is another thing: it damages the kernels, to show that the rungs of evidence find that.
Here the kernels are whole, and inputs, memory, driver or neighbours misbehave.
"""
