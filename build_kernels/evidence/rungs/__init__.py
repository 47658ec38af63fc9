"""The rungs of the ladder of evidence, one module each."""
