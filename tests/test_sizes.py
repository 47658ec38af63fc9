"""The sizes that keep the sources readable: of files, functions, signatures and the README."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from functools import cache
from pathlib import Path

import pytest
from statements import statements

ROOT = Path(__file__).parents[1]
KERNELS = "build_kernels/kernels"
MOST_LINES, MEDIAN_LINES = 450, 130
MOST_FUNCTION_LINES, MOST_PARAMETERS = 60, 12
MOST_WORDS = 600
LEAST_COMMENTS = 0.05

SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for package in ("build_kernels", "dsv4_router_runtime")
    for path in sorted((ROOT / package).rglob("*"))
    if path.suffix in (".py", ".cu")
}


@cache
def functions(text: str) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]:
    """Return the functions and methods of a module, those inside others too."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return tuple(node for node in statements(text) if isinstance(node, kinds))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines from its `def` on, without those of its docstring."""
    first, docstring = function.body[0], 0
    if ast.get_docstring(function) is not None:
        docstring = first.end_lineno - first.lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's parameters, without a method's own object or class."""
    listed = function.args
    named = [each.arg for each in (*listed.posonlyargs, *listed.args, *listed.kwonlyargs)]
    starred = [each for each in (listed.vararg, listed.kwarg) if each]
    return len(named) - (named[:1] in (["self"], ["cls"])) + len(starred)


def comment_lines(text: str) -> int:
    """Count the lines of a module that hold a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def words(markdown: str) -> int:
    """Count the words of a text as `wc -w` does: code, tables and their rules too."""
    return len(markdown.split())


def in_python() -> dict[str, str]:
    return {name: text for name, text in SOURCES.items() if name.endswith(".py")}


def test_no_file_is_longer_than_450_lines() -> None:
    lengths = {name: len(text.splitlines()) for name, text in SOURCES.items()}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}
    assert statistics.median(lengths.values()) <= MEDIAN_LINES


def test_no_function_of_the_host_is_longer_than_60_lines() -> None:
    """A kernel is long and straight: it is read under its banners."""
    long = {
        f"{name}: {function.name}": code_lines(function)
        for name, text in in_python().items()
        if not name.startswith(KERNELS)
        for function in functions(text)
        if code_lines(function) > MOST_FUNCTION_LINES
    }
    assert long == {}


def test_no_function_takes_more_than_12_parameters() -> None:
    wide = {
        f"{name}: {function.name}": parameters(function)
        for name, text in in_python().items()
        for function in functions(text)
        if parameters(function) > MOST_PARAMETERS
    }
    assert wide == {}


def test_of_20_lines_of_a_kernel_one_has_a_comment() -> None:
    texts = [text for name, text in in_python().items() if name.startswith(KERNELS)]
    assert len(texts) > 10
    lines = sum(len(text.splitlines()) for text in texts)
    assert sum(map(comment_lines, texts)) / lines >= LEAST_COMMENTS


def test_the_readme_has_at_most_600_words() -> None:
    assert words((ROOT / "README.md").read_text(encoding="utf-8")) <= MOST_WORDS


@pytest.mark.parametrize(
    ("source", "lines", "taken"),
    [
        ("def f(): pass", 1, 0),
        ("def f(a, /, b, *c, d, **e):\n    pass", 2, 5),
        ("def f(self, a):\n    '''Say\n\n    it.'''\n    return a\n\n", 2, 1),
        ("async def f(\n    cls,\n):\n    # why\n    return 1", 5, 0),
    ],
)
def test_lines_and_parameters_are_counted(source: str, lines: int, taken: int) -> None:
    (function,) = functions(source)
    assert (code_lines(function), parameters(function)) == (lines, taken)


def test_comments_and_words_are_counted() -> None:
    assert comment_lines("# one\nx = '# none'  # two\n\ny = 1\n") == 2
    assert words("One two.\n\n```\ncode\n```\n\n| a | b |\n| -: | --- |\n\nthree") == 16
