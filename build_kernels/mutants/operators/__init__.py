"""Mutate every instruction of a kernel's PTX by operators, and count how many mutants are found.

    build-kernels mutants --operators [--kernel K] [--arch A] [--quick] [--sample N --seed S]

`edits.py` holds the operators, `equivalents.toml` the changes that no check can or should find.
A mutant is killed if the emulated rung rejects it, in any case that executes its instruction.
"""
