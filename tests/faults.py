"""Shows that the tests catch deliberate faults: those of faults.toml, one at a time in a copy of the tree.

    python tests/faults.py [--only WORDS]

prints "caught" or "MISSED" for each and exits with 1 unless all are caught. The tests have to pass without a
fault. They run in forks of a process that has imported torch and transformers, which would take most of the
time. A fault in csrc compiles one unit anew.
"""

import argparse
import importlib
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
SECONDS = 300  # for the tests of a fault
# Triton reads whether to interpret when it is imported, which the second line does.
FOR_ALL = ("pytest", "torch")
WITHOUT_INTERPRETER = (
    *("transformers.models.bert.modeling_bert", "transformers.models.roberta.modeling_roberta"),
    *("transformers.models.mistral.modeling_mistral", "sentence_transformers"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name or file holds these words")
    only = parser.parse_args().only
    faults = tomllib.loads((ROOT / "tests/faults.toml").read_text())["fault"]
    faults = [fault for fault in faults if only in f"{fault['name']} {fault['file']}"]
    faults.sort(key=lambda fault: not fault.get("interpreter"))
    for fault in faults:
        count = (ROOT / fault["file"]).read_text().count(fault["old"])
        if count != 1:
            sys.exit(f"{fault['name']}: {fault['old']!r} stands {count} times in {fault['file']}")
    os.environ["OMP_NUM_THREADS"] = "1"
    load(FOR_ALL)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "embedfuse"
        copy_tree(tree)
        if any("unit" in fault for fault in faults):
            build(tree)
        outcomes = []
        for number, fault in enumerate(faults, 1):
            if not fault.get("interpreter"):
                load(WITHOUT_INTERPRETER)
            began = time.monotonic()
            outcomes.append(outcome_of(tree, fault))
            seconds = f"{time.monotonic() - began:.0f} s"
            print(
                f"{number}/{len(faults)} {outcomes[-1]} in {seconds}: {fault['name']}", flush=True
            )
    caught = outcomes.count("caught")
    print(f"caught {caught} of {len(faults)}")
    return int(caught < len(faults))


def load(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)


def copy_tree(tree: Path) -> None:
    """What git knows, with changes that are not committed, and the compiled modules."""
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    names += [str(path.relative_to(ROOT)) for path in ROOT.glob("python/embedfuse/_c*.so")]
    for name in names:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    (tree / "python/embedfuse/triton_kernels").symlink_to(tree / "triton_kernels")


def build(tree: Path) -> None:
    """The C++ module with little optimisation, which takes a quarter of the time."""
    compiler = tree / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O1\n')
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "EMBEDFUSE_BUILD_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "python"]
    subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True)


def outcome_of(tree: Path, fault: dict) -> str:
    with applied(tree, fault):
        code, text = run(tree, fault)
    if code not in (0, 1):
        print(text)
    return {0: "MISSED", 1: "caught", None: "not done"}.get(code, "BROKEN")


@contextmanager
def applied(tree: Path, fault: dict) -> Iterator[None]:
    path = tree / fault["file"]
    kept = {path: path.read_bytes()}
    if unit := fault.get("unit"):
        (work,) = tree.glob("build/cpython-*")
        for file in (
            work / f"embedfuse._cpu/{unit}.cpp.o",
            *tree.glob("python/embedfuse/_cpu*.so"),
        ):
            kept[file] = file.read_bytes()
    path.write_text(path.read_text().replace(fault["old"], fault["new"]))
    try:
        if unit:
            compile_unit(work, unit)
        yield
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


def compile_unit(work: Path, unit: str) -> None:
    """Compiles the unit and links the module, but no other unit that reads the same header."""
    import ninja

    ask = [Path(ninja.BIN_DIR) / "ninja", "-C", work, "-t", "commands"]
    for command in subprocess.check_output(ask, text=True).splitlines():
        if f"{unit}.cpp.o" in command:
            subprocess.run(command, shell=True, cwd=work, check=True, capture_output=True)


def run(tree: Path, fault: dict) -> tuple[int | None, str]:
    """pytest's exit code, None after SECONDS, and its output."""
    with tempfile.NamedTemporaryFile() as output:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=run_here, args=(tree, fault, output.name))
        process.start()
        process.join(SECONDS)
        code = process.exitcode
        process.kill()
        return code, Path(output.name).read_text()


def run_here(tree: Path, fault: dict, output: str) -> None:
    import pytest

    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    paths = [str(path) for path in (tree / "python", tree, tree / "tests")]
    sys.path[:0] = paths
    # Compiled Python would be told from its source by the second, in which a fault may come and go.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = ["-x", "-q", "-p", "no:cacheprovider", *shlex.split(fault["tests"])]
    if fault.get("interpreter"):
        os.environ["TRITON_INTERPRET"] = "1"
        command += ["-p", "tests.interpret.triton_only"]
    if "unit" in fault:
        os.environ["EMBEDFUSE_CPU_ISA"] = "avx2"
    sys.exit(int(pytest.main(command)))


if __name__ == "__main__":
    sys.exit(main())
