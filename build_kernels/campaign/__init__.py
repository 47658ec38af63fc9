"""The fault campaign: faults around a kernel or the runtime, each with its expected outcome.

    build-kernels faults [--list] [--only ID] [--json]

`table.FAULTS` is the list. Each row names the hazard, the fault, the machine that it needs and the
expected outcome. A row of `tears` or `residue` runs in the emulator on the PTX as it was built;
`build-kernels verify --rung faults` keeps its results with the other evidence. Any other row is
proved by the tests that it names. `guards` lists the parts of the kernels that rows depend on, each
with the edit that removes it.

`mutants/` damages the kernels instead, to show that the rungs of evidence find it. Here the kernels
are whole, and inputs, memory, driver or neighbours misbehave.
"""
