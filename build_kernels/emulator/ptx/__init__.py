"""Read PTX text: tokens, the grammar, and the objects that the text is parsed into.

Nothing here depends on the emulator or on NumPy, so any tool of the project can read PTX with it.
"""
