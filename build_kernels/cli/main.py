"""The command `build-kernels`: results on stdout, messages on stderr, a failure never exits 0."""

from __future__ import annotations

import click

import dsv4_router_runtime
from build_kernels.bench.command import bench_command
from build_kernels.building.compilers import CompileError, toolchain_versions
from build_kernels.campaign.command import faults_command
from build_kernels.evidence import verify_command
from build_kernels.evidence.coverage_command import coverage_command
from build_kernels.mutants.command import mutants_command
from build_kernels.release.keys import keygen_command
from build_kernels.release.reproduce import reproduce_command
from build_kernels.release.sign import sign_command
from build_kernels.release.verify_signature import verify_signature_command
from build_kernels.review.budget import budget_command
from build_kernels.review.diff import diff_command

from .build import build_command
from .clean import clean_command
from .inspect import inspect_command
from .list import list_command


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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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


for command in (
    *(build_command, clean_command, list_command, inspect_command),
    *(verify_command, coverage_command, mutants_command, faults_command, bench_command),
    *(diff_command, budget_command, reproduce_command),
    *(keygen_command, sign_command, verify_signature_command),
):
    main.add_command(command)
