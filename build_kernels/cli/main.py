"""The command `build-kernels`: results on stdout, messages on stderr, a failure never exits 0."""

from __future__ import annotations

from importlib import import_module

import click

import dsv4_router_runtime
from build_kernels.building.compilers import CompileError, toolchain_versions

COMMANDS = {
    "build": "build_kernels.cli.build",
    "clean": "build_kernels.cli.clean",
    "list": "build_kernels.cli.list",
    "inspect": "build_kernels.cli.inspect",
    "verify": "build_kernels.evidence.command",
    "coverage": "build_kernels.evidence.coverage_command",
    "mutants": "build_kernels.mutants.command",
    "faults": "build_kernels.campaign.command",
    "bench": "build_kernels.bench.command",
    "diff": "build_kernels.review.diff",
    "budget": "build_kernels.review.budget",
    "reproduce": "build_kernels.release.reproduce",
    "keygen": "build_kernels.release.keys",
    "sign": "build_kernels.release.sign",
    "verify-signature": "build_kernels.release.verify_signature",
}


class Commands(click.Group):
    """The commands, each imported when it is called: all together take a fifth of a second."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the commands' names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, context: click.Context | None, name: str) -> click.Command | None:
        """Import the command `name`: `<name>_command` of its module."""
        if name not in COMMANDS:
            return None
        command = getattr(import_module(COMMANDS[name]), f"{name.replace('-', '_')}_command")
        assert isinstance(command, click.Command)
        return command


def print_versions(context: click.Context, _option: click.Parameter, given: bool) -> None:
    """Print the versions that decide a build, and exit."""
    if not given or context.resilient_parsing:
        return
    print(f"dsv4-router {dsv4_router_runtime.__version__}")
    try:
        for name, version in sorted(toolchain_versions().items()):
            print(f"{name} {version}")
    except CompileError as error:
        print(f"no toolchain: {error}")
    context.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_versions,
    help="Print this project's version and those of the compilers.",
)
def main() -> None:
    """Build the DeepSeek-V4 router's kernels ahead of time, without a GPU or a CUDA toolkit."""
