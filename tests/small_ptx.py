"""A small PTX module for the tests of mutants: `body` stands before its ret."""

from __future__ import annotations

MODULE = """
.version 8.0
.target sm_90a
.visible .entry k(.param .u64 out) {{
.reg .pred %p<4>;
.reg .b32 %r<16>;
.reg .f32 %f<4>;
.reg .b64 %rd<4>;
{body}
ret;
}}
"""
