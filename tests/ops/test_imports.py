"""What imports what: kernels know nothing of the ops that call them."""

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "triton_kernels").glob("*.py"))


def imported(path: Path) -> list[str]:
    """Modules, and names from them as if they were modules."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_triton_kernels_import_no_op(path):
    assert [name for name in imported(path) if f"{name}.".startswith("embedfuse.ops.")] == []


def test_there_are_kernels():
    assert len(KERNELS) > 10
