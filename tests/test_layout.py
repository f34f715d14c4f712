"""Which folder may import which; read from the sources, nothing is imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    """Full names that a file imports: of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def imports(*folders: str) -> list[tuple[str, str]]:
    """(file, imported name) of all files in these folders."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return [(str(path.relative_to(ROOT)), name) for path in files for name in imported(path)]


def test_no_file_imports_a_test_file():
    files = ROOT.glob("tests/**/test_*.py"), ROOT.glob("benchmarks/**/test_*.py")
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for found in files for path in found
    }
    assert [pair for pair in imports("tests", "benchmarks") if pair[1] in names] == []


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("benchmarks", "tests"),
        ("python/embedfuse", "tests"),
        ("python/embedfuse", "benchmarks"),
        ("triton_kernels", "embedfuse.ops"),
    ],
)
def test_folders_that_do_not_import_each_other(folder, forbidden):
    def is_forbidden(name: str) -> bool:
        return f"{name}.".startswith(f"{forbidden}.")

    assert [pair for pair in imports(folder) if is_forbidden(pair[1])] == []


def test_no_file_changes_the_search_path_of_modules():
    files = [path for name in ("python", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    assert [str(path) for path in files if "sys.path" in path.read_text("utf-8")] == []
