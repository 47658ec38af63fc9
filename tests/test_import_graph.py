"""No import circle: imports for type checking and inside functions count as well."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("build_kernels",)


def modules(folder: Path) -> dict[str, Path]:
    """Return the file of each module below a folder of packages, by dotted name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """Return the known modules that a module imports, wherever the statement stands.

    The package of an imported module is left out: its `__init__` gathers public names.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*outer, *([node.module] if node.module else [])])
            found |= {
                inner if (inner := f"{base}.{alias.name}") in known else base
                for alias in node.names
            }
    return found & known.keys()


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one import circle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_no_import_circle(package: str) -> None:
    known = modules(ROOT / package)
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert " -> ".join(circle(graph)) == ""


def test_the_folders_of_the_emulator_are_layers() -> None:
    """Text, memory, ordering, launch, execution, access, instructions: each uses those before."""
    known = modules(ROOT / "build_kernels/emulator")
    inner = {name: name.split(".")[2] for name in known if name.count(".") == 3}
    graph: dict[str, set[str]] = {}
    for name, folder in inner.items():
        used = {inner[other] for other in imports(name, known[name], known) & inner.keys()}
        graph.setdefault(folder, set()).update(used - {folder})
    assert " -> ".join(circle(graph)) == ""


@pytest.mark.parametrize(
    "statement",
    [
        "from made.b import x",
        "from made import b",
        "import made.b",
        "from .b import x",
        "from . import b",
        "def f():\n    from made.b import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made.b import x",
    ],
)
def test_a_circle_is_found_however_it_is_written(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    package = tmp_path / "made"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(statement)
    (package / "b.py").write_text("import made.a\nx = 1")
    known = modules(package)
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert set(circle(graph)) == {"made.a", "made.b"}
