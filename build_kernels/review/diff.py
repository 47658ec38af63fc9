"""`build-kernels diff`: what changed between two sets, kernel by kernel."""

from __future__ import annotations

import sys

import click

from build_kernels.cli.errors import reported_errors
from build_kernels.cli.options import json_option

from .code import opcodes
from .difference import compare
from .render import to_json, to_markdown, to_text
from .side import read_side


@click.command("diff")
@click.argument("before")
@click.argument("after")
@json_option
@click.option("--markdown", is_flag=True, help="Print Markdown on stdout, as for a review.")
@click.option("--sass", is_flag=True, help="Count every opcode of changed cubins, with nvdisasm.")
def diff_command(before: str, after: str, as_json: bool, markdown: bool, sass: bool) -> None:
    """Compare two sets: bytes, SASS, ABI, launch, problem range, resources, opcodes and evidence.

    BEFORE and AFTER are each a folder, a wheel, or a git ref, whose tracked manifest is read: that
    of the current folder's repository. Where a folder has the name of a branch, the branch is
    refs/heads/NAME.

    Exit status: 0 if nothing differs, 1 if something does, 2 if a side cannot be read.
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown are two forms of output: leave one out")
    with reported_errors(status=2):
        comparison = compare(read_side(before), read_side(after), opcodes if sass else None)
    write = to_json if as_json else to_markdown if markdown else to_text
    print(write(comparison))
    if not comparison.is_same:
        sys.exit(1)
