"""The names in the texts exist; the README's commands are pyproject.toml's and CI's."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
import typing
from functools import lru_cache
from pathlib import Path

import pytest
from statements import statements

from build_kernels.kernels.shapes import MAX_PREFILL_TOKENS, workspace_bytes
from build_kernels.specs import ARCHITECTURES
from dsv4_router_runtime.artifacts.dispatch import LayerProblem, plan_layer
from dsv4_router_runtime.artifacts.kernel import LAYOUTS
from dsv4_router_runtime.artifacts.limits import MAX_EXPERTS
from dsv4_router_runtime.artifacts.manifest import SCHEMA_VERSION, parse_manifest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PEERS = (ROOT / "build_kernels" / "bench" / "PEERS.md").read_text(encoding="utf-8")
PRODUCTION = (ROOT / "dsv4_router_runtime" / "PRODUCTION.md").read_text(encoding="utf-8")
# One run each.
REPORTS = ("h200", "h200_prefill")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
MANIFEST = parse_manifest((ROOT / "artifacts" / "manifest.json").read_bytes())
PROJECT, BUILDER = (
    tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))
    for folder in (".", "build_kernels")
)
EXTRAS = BUILDER["project"]["optional-dependencies"]
REQUIREMENTS = BUILDER["tool"]["hatch"]["metadata"]["hooks"]["custom"]["dependencies"]


def features() -> list[list[str]]:
    """Return the table of features, header first, as rows of cells."""
    lines = [line for line in PEERS.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [rows[0], *rows[2:]]


@lru_cache
def functions_in(name: str) -> set[str]:
    """Return the names of the functions of a test module, at its top or in a class."""
    text = (ROOT / "tests" / name).read_text(encoding="utf-8")
    return {node.name for node in statements(text) if isinstance(node, ast.FunctionDef)}


def keywords(function) -> set[str]:
    """Name the keyword-only parameters, those of an unpacked TypedDict included."""
    parameters = inspect.signature(function).parameters.values()
    names = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    for each in (each for each in parameters if each.kind is each.VAR_KEYWORD):
        (unpacked,) = typing.get_args(typing.get_type_hints(function)[each.name])
        names |= set(unpacked.__annotations__)
    return names


def test_the_table_has_no_holes():
    header, *rows = features()
    assert header[1] == "this project"
    assert header[-1] == "shown by"
    assert len(rows) > 20
    for row in rows:
        assert len(row) == len(header), row
        assert all(row), row


def test_every_feature_names_a_test_that_exists():
    for feature, *_, shown_by in features()[1:]:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", shown_by)
        assert len(named) == shown_by.count("::") > 0, feature
        for module, test in named:
            assert test in functions_in(module), f"{feature}: {module}::{test}"


def test_every_test_that_the_texts_name_exists():
    for module, test in re.findall(r"\b(test_\w+\.py)::(test_\w+)", README + PEERS + PRODUCTION):
        assert test in functions_in(module), f"{module}::{test}"


def test_every_sentence_of_the_contract_names_a_test():
    contract = PRODUCTION.split("## The contract\n")[1].split("\n## ")[0]
    rows = [line for line in contract.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10
    for row in rows:
        assert re.search(r"`test_\w+\.py::test_\w+`", row), row


def test_the_floors_of_the_drivers_are_the_specs():
    for arch in ARCHITECTURES:
        floor = f"{arch.driver // 1000}.{arch.driver % 1000 // 10}"
        assert f"({arch.name}), driver of CUDA {floor} or later" in PRODUCTION


@lru_cache
def one_launch(num_experts: int) -> int:
    """Return the most tokens that one launch takes, of any layer on any architecture."""
    layers = [
        LayerProblem(
            layout=layout, tma_loadable=True, hashed=hashed, num_experts=num_experts, top_k=1, k=64
        )
        for layout in LAYOUTS
        for hashed in (False, True)
    ]
    plans = [plan_layer(MANIFEST, layer, arch) for layer in layers for arch in MANIFEST.driver]
    ends = {plan.steps[-2].max_tokens for plan in plans if plan.steps[-1].is_product_and_select}
    (most,) = ends
    return most


def claims(text: str) -> list[tuple[int, ...]]:
    """Return (tokens, fewest experts, most experts) of "256 tokens of 384 experts (384 of 256)"."""
    found = []
    for phrase in re.findall(
        r"\d+ tokens of (?:[\d.,() ]|of|and|experts)+", " ".join(text.split())
    ):
        for tokens, low, high in re.findall(r"(\d+)(?: tokens)? of (\d+)(?:\.\.(\d+))?", phrase):
            found.append((int(tokens), int(low), int(high or low)))
    return found


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("README.md", 4),
        ("CHANGELOG.md", 4),
        ("dsv4_router_runtime/PRODUCTION.md", 4),
        ("dsv4_router_runtime/router.py", 2),
        ("dsv4_router_runtime/integrations/SGLANG.md", 2),
        ("dsv4_router_runtime/integrations/TRANSFORMERS.md", 2),
        ("dsv4_router_runtime/integrations/VLLM.md", 2),
    ],
)
def test_one_launch_ends_where_the_texts_say(file: str, count: int):
    text = (ROOT / file).read_text(encoding="utf-8")
    said = claims(text)
    if file == "README.md":
        ranges = re.findall(r"(\d+)\.\.(\d+)", text.split("| experts E |")[1].split("\n")[0])
        ends = re.findall(r"\d+", text.split("| one launch (CuTeDSL) up to N |")[1].split("\n")[0])
        said = [(int(n), int(a), int(b)) for n, (a, b) in zip(ends, ranges, strict=True)]
    assert len(said) == count
    for tokens, low, high in said:
        assert one_launch(low) == one_launch((low + high) // 2) == one_launch(high) == tokens
    if count == 4:
        covered = [num_experts for _, low, high in said for num_experts in range(low, high + 1)]
        assert sorted(covered) == list(range(1, MAX_EXPERTS + 1))


def test_the_fewest_and_the_most_that_one_launch_takes_are_as_said():
    # The number changes with the number of tiles of 128 experts.
    ends = [one_launch(num_experts) for num_experts in (*range(1, MAX_EXPERTS, 64), MAX_EXPERTS)]
    assert f"to N = {min(ends)}..{max(ends)}, by E" in PEERS


def test_the_sizes_in_the_texts_are_the_builds():
    assert f"# the kernels, {len(MANIFEST.kernels)} artifacts" in README
    scratch = f"{workspace_bytes(MAX_PREFILL_TOKENS) / 1e6:.1f} MB"
    limits = (ROOT / "dsv4_router_runtime/artifacts/limits.py").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"the kernels here take {scratch} at most" in limits
    assert f"Scratch is {scratch} per stream" in changelog
    assert f"- The manifest has schema {SCHEMA_VERSION}." in changelog
    assert f"\n| {SCHEMA_VERSION} | " in changelog


def test_the_readmes_table_is_the_stored_reports():
    """To renew it, print the `readme_table` of these reports."""
    pytest.importorskip("rich", reason="needs the extra `bench`")
    from build_kernels.bench.report import read_report
    from build_kernels.bench.table import readme_table

    folder = ROOT / "build_kernels" / "bench"
    table = readme_table(*(read_report(folder / f"{name}.json") for name in REPORTS))
    assert f"\n\n{table}\n\n" in README


def test_every_option_of_a_router_is_a_feature():
    pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    from dsv4_router_runtime import Router

    options = keywords(Router.__init__) | keywords(Router.__call__)
    words = set(re.findall(r"\w+", " ".join(row[0] for row in features()[1:])))
    assert "to_physical" in options
    assert options - {"artifacts", "routed_scaling_factor", "pdl"} <= words
    assert "PDL" in words


def test_examples_call_what_there_is():
    """Every keyword that an example passes to a Router, or to its making, is one of theirs."""
    pytest.importorskip("torch", reason="torch is the caller's and is not installed here")
    from dsv4_router_runtime import Router

    assert EXAMPLES
    for example in EXAMPLES:
        for call in (node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name == "dsv4.Router" or name.endswith("router"):
                known = keywords(Router.__init__ if name == "dsv4.Router" else Router.__call__)
                assert {each.arg for each in call.keywords} <= known, ast.unparse(call)


def test_the_readme_the_metadata_and_the_linters_name_the_same_pythons():
    low, high = re.findall(r"Python 3\.(\d+) to 3\.(\d+)", README)[0]
    for project in (PROJECT, BUILDER):
        assert project["project"]["requires-python"] == f">=3.{low}"
    named = re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["project"]["classifiers"]))
    assert named == [str(minor) for minor in range(int(low), int(high) + 1)]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{low}"
    assert PROJECT["tool"]["mypy"]["python_version"] == f"3.{low}"


def test_every_extra_that_the_readme_installs_exists():
    named = re.findall(r"\./build_kernels\[([\w,]+)\]", COMMANDS)
    assert named
    assert {extra for each in named for extra in each.split(",")} <= set(EXTRAS)
    assert "-e . -e ./build_kernels" in COMMANDS.replace("'", "")


def test_the_readme_names_the_dsl_that_is_pinned():
    assert re.findall(r"nvidia-cutlass-dsl ([\d.]+\d)", README) == [
        requirement.removeprefix("nvidia-cutlass-dsl==")
        for requirement in REQUIREMENTS
        if requirement.startswith("nvidia-cutlass-dsl==")
    ]


def test_ci_runs_the_readmes_test_command():
    command = COMMANDS.split("&& ")[-1].splitlines()[0]
    assert command == "python -m pytest -q -n 2"
    assert f"start_leg first {command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_packages_are_pinned_to_one_version_only_for_bytes_evidence_or_lint():
    decide = ("nvidia-", "pyelftools", "sentryward", "ruff", "mypy")
    for requirement in (*REQUIREMENTS, *(each for extra in EXTRAS.values() for each in extra)):
        assert ("==" in requirement) == requirement.startswith(decide), requirement
