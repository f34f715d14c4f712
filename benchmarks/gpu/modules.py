"""Puts the package in place without an installer: the link to the Triton kernels, and the compiled modules.

The modules are those of `bundle/` where they are of these sources and load in this Python; else those that
are there already, if they are no older than the sources; else `_cuda` is built, in seconds, and the CPU runs
on torch.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.gpu.bundle import (
    FOLDER,
    MODULES,
    NOTE,
    PACKAGE,
    ROOT,
    SUFFIX,
    build,
    load_error,
    source_files,
    sources,
)

LINK = PACKAGE / "triton_kernels"


def put_in_place() -> list[str]:
    """Returns what was done, a line each."""
    if not os.path.lexists(LINK):
        LINK.symlink_to("../../triton_kernels")
    carried = FOLDER / "embedfuse"
    refusal = stale(carried, MODULES)
    if refusal is None:
        copy(carried, MODULES)
        return ["the modules of bundle/"]
    lines = [f"bundle/ is left: {refusal}"]
    refusal = stale(PACKAGE, ("_cuda",)) if (PACKAGE / NOTE).exists() else older_than_sources()
    if refusal is None:
        return [*lines, "the modules of python/embedfuse"]
    return [*lines, f"the modules of python/embedfuse are left: {refusal}", build_cuda()]


def stale(folder: Path, modules: tuple[str, ...]) -> str | None:
    """Why these modules are not used; None if they are."""
    if not (folder / NOTE).exists():
        return "there are none"
    if json.loads((folder / NOTE).read_text())["sources"] != sources():
        return "they were made from other sources"
    reasons = [reason for name in modules if (reason := load_error(folder, name))]
    return "; ".join(reasons) or None


def older_than_sources() -> str | None:
    """As stale, of modules that were not put here by this file: by their times, as make does."""
    made = [PACKAGE / (name + SUFFIX) for name in MODULES]
    if missing := [path.name for path in made if not path.exists()]:
        return f"there is no {missing[0]}"
    newest = max(path.stat().st_mtime for path in source_files())
    if min(path.stat().st_mtime for path in made) < newest:
        return "they are older than the sources"
    reasons = [reason for name in MODULES if (reason := load_error(PACKAGE, name))]
    return "; ".join(reasons) or None


def copy(folder: Path, modules: tuple[str, ...]) -> None:
    """Into the package; a process that has the old ones loaded keeps them."""
    for name in (*(module + SUFFIX for module in modules), "_build.json"):
        shutil.copy(folder / name, PACKAGE / f"{name}.part")
        os.replace(PACKAGE / f"{name}.part", PACKAGE / name)
    (PACKAGE / NOTE).write_text(json.dumps({"sources": sources()}) + "\n")


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
