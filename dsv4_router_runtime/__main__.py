"""`python -m dsv4_router_runtime doctor | explain`: results on stdout, errors on stderr.

Neither command needs a GPU to start, and none imports torch but `doctor --torch`.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from . import doctor, explain
from .artifacts.folder import open_artifacts
from .artifacts.kernel import LAYOUTS
from .device import driver
from .doctor import finding
from .errors import DriverMissingError, RouterError
from .version import package_version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    # A path that the terminal's encoding lacks would stop the whole output.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _doctor(options) if options.command == "doctor" else _explain(options)
    except (RouterError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    # Python's own exit code, 1, says that this machine can route.
    except Exception:
        traceback.print_exc()
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=finding.COMMAND)
    commands = parser.add_subparsers(dest="command", required=True)
    help_text = "check this machine; exit 0 if it can route, 1 with warnings, 2 if it cannot"
    check = commands.add_parser("doctor", help=help_text, description=help_text)
    check.add_argument("--device", type=int, metavar="N", help="one GPU (default: all of them)")
    check.add_argument("--quick", action="store_true", help="leave the self-test out")
    check.add_argument("--torch", action="store_true", help="import torch: does it see the GPU?")
    form = check.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--report", action="store_true", help="print text for a bug report")
    help_text = "show which kernel serves a call, and why; exit 2 if none does"
    call = commands.add_parser("explain", help=help_text, description=help_text)
    call.add_argument("--n", type=int, required=True, help="tokens of the call")
    call.add_argument("--k", type=int, required=True, help="hidden size")
    call.add_argument("--experts", type=int, required=True, help="columns of W_gate")
    call.add_argument("--top-k", type=int, required=True, help="experts per token")
    call.add_argument("--layout", choices=LAYOUTS, default="kmajor", help="unit stride of W_gate")
    call.add_argument("--hash", action="store_true", help="a layer with tid2eid")
    call.add_argument("--images", action="store_true", help="a call that may have image rows")
    call.add_argument("--logits", action="store_true", help="a call with out_logits")
    call.add_argument("--same-bits", action="store_true", help="a Router with same_bits")
    place = call.add_mutually_exclusive_group()
    place.add_argument("--arch", metavar="SM", help="architecture, such as sm_90a")
    place.add_argument("--device", type=int, metavar="N", help="architecture of GPU N (default: 0)")
    call.add_argument("--json", action="store_true", help="print JSON")
    for command in (check, call):
        command.add_argument(
            "--artifacts", type=Path, metavar="FOLDER", help="another set than the installed one"
        )
    return parser


def _doctor(options: argparse.Namespace) -> int:
    found = doctor.examine(
        device=options.device,
        quick=options.quick,
        import_torch=options.torch,
        artifacts=options.artifacts,
    )
    if options.json:
        print(json.dumps(finding.as_json(found), indent=1))
    else:
        text = "\n".join(map(str, found))
        if options.report:
            text = finding.without_names(f"{_heading()}\n{text}", options.artifacts)
        print(text)
    return finding.exit_code(found)


def _heading() -> str:
    return f"dsv4-router {package_version()} on {platform.system()} {platform.release()}"


def _explain(options: argparse.Namespace) -> int:
    question = explain.Question(
        num_tokens=options.n,
        k=options.k,
        num_experts=options.experts,
        top_k=options.top_k,
        layout=options.layout,
        hashed=options.hash,
        images=options.images,
        logits=options.logits,
        same_bits=options.same_bits,
    )
    artifacts = open_artifacts(options.artifacts)
    arch = _arch(options.device or 0) if options.arch is None else options.arch
    explained = explain.explain(artifacts, question, arch)
    document = explain.as_json(explained)
    print(json.dumps(document, indent=1) if options.json else explain.as_text(explained))
    return 0


def _arch(device: int) -> str:
    try:
        return driver.arch_of_device(device)
    except DriverMissingError as error:
        raise DriverMissingError(f"{error}; name an architecture: --arch sm_90a") from error


if __name__ == "__main__":
    sys.exit(main())
