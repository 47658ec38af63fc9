"""Prove that the checks can fail: put faults into the project's own PTX for the rungs to reject.

A mutant changes the text of a built kernel. It is rejected by the emulated rung when a run has a
finding, wrong ids or weights, or is refused; by the protocol rung when SentryWard names a fault.
A mutant that both accept must carry the proof that it does no harm.

    python -m build_kernels.mutants [--rung emulated] [--rung protocol] [--only NAME] [--json]

prints the table mutant x rung and fails if one survives; `table.txt` holds the last one.

`operators/` changes every instruction instead, one at a time: `build-kernels mutants --operators`.

Importing this imports nothing, so that `__main__` can name the missing extra.
"""
