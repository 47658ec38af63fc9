"""Options and argument types that subcommands share."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from build_kernels.specs import ARCHITECTURES, KERNELS, TARGETS

KERNEL_NAMES = tuple(spec.name for spec in KERNELS)
ARCH_NAMES = tuple(arch.name for arch in ARCHITECTURES)


class KernelName(click.ParamType):
    """The name of a kernel that this package can build."""

    name = "kernel"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        name = str(value)
        if name not in KERNEL_NAMES:
            near = difflib.get_close_matches(name, KERNEL_NAMES, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            self.fail(
                f"no kernel is called {name!r}; {hint}All: {', '.join(KERNEL_NAMES)}", param, ctx
            )
        return name


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
jobs_option = click.option(
    "--jobs", type=click.IntRange(min=1), help="Processes. Default: one per CPU."
)
arch_option = click.option(
    "--arch",
    "archs",
    multiple=True,
    type=click.Choice(tuple(TARGETS)),
    help="Only this architecture; repeatable. Default: all but the families' (f).",
)
kernel_option = click.option(
    "--kernel",
    "names",
    multiple=True,
    type=KernelName(),
    metavar="KERNEL",
    help="Only this kernel; repeatable. Default: all.",
)


def artifacts_option(help_text: str) -> Callable[[Any], Any]:
    """Make the option `--artifacts FOLDER`; the folder need not exist."""
    return click.option(
        "--artifacts", type=click.Path(path_type=Path, file_okay=False), help=help_text
    )


shown_option = artifacts_option(
    "The set to show. Default: artifacts/ of this checkout, or the installed wheel's set."
)
