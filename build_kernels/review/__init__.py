"""What a change does to the kernels: two sets compared, and one set held to its budgets.

Importing this package imports no compiler. A git ref's manifest is compared without any cubin.
"""
