"""Read PTX text: tokens, the grammar, and the objects that the text is parsed into.

It imports the standard library alone, so that a rung or tool without NumPy can read PTX.
"""
