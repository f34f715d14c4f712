"""Real text that every machine has: the docstrings of Python's standard library."""

import ast
import functools
import random
import sysconfig
import warnings
from pathlib import Path


def stdlib_docstrings(limit: int | None = None) -> list[str]:
    """Distinct docstrings of modules, classes and functions, in a fixed shuffled order."""
    return list(_stdlib_docstrings()[:limit])


@functools.cache
def _stdlib_docstrings() -> tuple[str, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            with warnings.catch_warnings():  # old string escapes in the library's own files
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # lib2to3 and the like keep files that are not meant to parse
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring:
                    found[docstring] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return tuple(texts)
