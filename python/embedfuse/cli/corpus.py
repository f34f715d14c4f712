"""Real text that is on every machine: the docstrings of Python's standard library."""

import ast
import functools
import itertools
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_docstrings(limit: int | None = None) -> list[str]:
    """Distinct docstrings of modules, classes and functions, in a fixed shuffled order."""
    return list(_stdlib_docstrings()[:limit])


@functools.cache
def _stdlib_docstrings() -> tuple[str, ...]:
    trees = (ast.walk(tree) for _, tree in _stdlib_modules())
    found = dict.fromkeys(
        ast.get_docstring(node)
        for node in itertools.chain.from_iterable(trees)
        if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS))
    )
    texts = [text for text in found if text]
    random.Random(0).shuffle(texts)
    return tuple(texts)


@functools.cache
def stdlib_pairs() -> tuple[tuple[str, str], ...]:
    """(a function's qualified name and arguments, first paragraph of its docstring), paragraphs distinct."""
    found: dict[str, str] = {}
    for module, tree in _stdlib_modules():
        for name, function in _functions(tree, module):
            paragraph = (ast.get_docstring(function) or "").split("\n\n")[0]
            document = " ".join(paragraph.split())
            if len(document.split()) >= 3:
                found.setdefault(document, f"{name}({ast.unparse(function.args)})")
    return tuple((query, document) for document, query in found.items())


def _functions(
    node: ast.AST, path: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, *_FUNCTIONS)):
            name = f"{path}.{child.name}"
            if isinstance(child, _FUNCTIONS):
                yield name, child
            yield from _functions(child, name)


def _stdlib_modules() -> Iterator[tuple[str, ast.Module]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            with warnings.catch_warnings():  # old string escapes in the library's own files
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # lib2to3 and others contain files that do not parse on purpose
        yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), tree
