"""Decode instructions into functions that act on a warp, one family of PTX mnemonics per file.

Each module of a family exports `INSTRUCTIONS`, from opcode prefixes to decoders; `table` merges
them. The other modules hold code that several families share.
"""
