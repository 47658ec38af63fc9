"""No module of the two packages imports itself by way of others, and the runtime no builder.

The graph is read from the sources, so that imports in functions and for type checkers count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from statements import statements

ROOT = Path(__file__).parents[1]
PACKAGES = ("build_kernels", "dsv4_router_runtime")


def modules(root: Path) -> dict[str, Path]:
    """Return the file of each module by its dotted name; a package is its `__init__`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports, anywhere in its file."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def graph(root: Path) -> dict[str, set[str]]:
    """Return which modules each module imports. A name that is no module counts for its package."""
    known = modules(root)
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = (
            target if target in known else target.rpartition(".")[0]
            for target in imported(name, path)
        )
        edges[name] = {target for target in targets if target in known and target != name}
    return edges


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one import circle in the order in which they import; [] if none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    found = circle(graph(ROOT))
    assert not found, " -> ".join(found)


def test_the_folders_of_the_emulator_are_layers() -> None:
    """Text, memory, ordering, launch, execution, access, instructions: each uses those before."""
    edges = graph(ROOT)
    prefix = "build_kernels.emulator."
    folder = {name: name.split(".")[2] for name in edges if name.count(".") == 3 and prefix in name}
    layers: dict[str, set[str]] = {}
    for name, own in folder.items():
        used = {folder[target] for target in edges[name] if target in folder}
        layers.setdefault(own, set()).update(used - {own})
    assert len(layers) > 5
    assert not circle(layers)


def test_the_runtime_imports_no_builder() -> None:
    edges = graph(ROOT)
    offenders = [
        f"{name} imports {target}"
        for name in edges
        for target in edges[name]
        if name.startswith("dsv4_router_runtime") and target.startswith("build_kernels")
    ]
    assert not offenders


@pytest.mark.parametrize(
    "statement",
    [
        "from .b import thing",
        "from . import b",
        "from build_kernels.b import thing",
        "import build_kernels.b",
        "def late():\n    from .b import thing",
        "if TYPE_CHECKING:\n    from .b import Thing",
    ],
)
def test_a_circle_is_found_and_named(tmp_path: Path, statement: str) -> None:
    package = tmp_path / "build_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(f"{statement}\n")
    (package / "b.py").write_text("from .c import thing\n")
    (package / "c.py").write_text("from build_kernels import a\n")
    found = circle(graph(tmp_path))
    names = [f"build_kernels.{letter}" for letter in "abc"]
    assert found[0] == found[-1]
    assert sorted(found[1:]) == names
    assert found[found.index("build_kernels.a", 0, 3) + 1] == "build_kernels.b"
