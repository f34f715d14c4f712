"""Puts the package in place without an installer: the link to the Triton kernels, and the compiled modules.

The modules are those of `bundle/` where they are of these sources and load in this Python; else those that
are there already; else `_cuda` is built, in seconds, and the CPU runs on torch.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.gpu.bundle import FOLDER, MODULES, PACKAGE, ROOT, SUFFIX, build, load_error, sources

LINK = PACKAGE / "triton_kernels"


def put_in_place() -> list[str]:
    """Returns what was done, a line each."""
    if not os.path.lexists(LINK):
        LINK.symlink_to("../../triton_kernels")
    carried = FOLDER / "embedfuse"
    if reason := stale(carried):
        lines = [f"bundle/ is left: {reason}"]
        if any(load_error(PACKAGE, name) for name in MODULES):
            return [*lines, build_cuda()]
        return [*lines, "the modules of python/embedfuse, as they were"]
    copy(carried, MODULES)
    return ["the modules of bundle/"]


def stale(folder: Path) -> str | None:
    """Why the modules of the bundle are not used; None if they are."""
    note = folder / "sources.json"
    if not note.exists():
        return "it holds no modules"
    if json.loads(note.read_text())["sources"] != sources():
        return "it was made from other sources"
    reasons = [reason for name in MODULES if (reason := load_error(folder, name))]
    return "; ".join(reasons) or None


def copy(folder: Path, modules: tuple[str, ...]) -> None:
    for name in (*(module + SUFFIX for module in modules), "_build.json"):
        shutil.copy(folder / name, PACKAGE / name)


def build_cuda() -> str:
    """Away from pyproject.toml, which setuptools before 77 does not read."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copy(ROOT / "setup.py", tree)
        for name in ("csrc", "triton_kernels"):
            shutil.copytree(ROOT / name, tree / name)
        shutil.copytree(
            ROOT / "python", tree / "python", ignore=shutil.ignore_patterns("*.so", LINK.name)
        )
        build(tree, "--inplace", EMBEDFUSE_BUILD_CPP="0")
        copy(tree / "python" / "embedfuse", ("_cuda",))
    return "built _cuda; no _cpu: ops on the CPU run on torch"
