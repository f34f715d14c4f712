"""One source tree, one sdist and one wheel for all tests here, each in a temporary folder."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from embedfuse import native
from tests.build import emulated_cuda

ROOT = Path(__file__).parents[2]
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "csrc",
    "python",
    "triton_kernels",
)
BUILT = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The variables of a build: none of embedfuse's own set, and `import torch` fails."""
    stub = tmp_path_factory.mktemp("no_torch") / "torch"
    stub.mkdir()
    (stub / "__init__.py").write_text("raise RuntimeError('the build imported torch')\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("EMBEDFUSE_")}
    for name in ("CXX", "CUDA_HOME"):
        clean.pop(name, None)
    return {**clean, "PYTHONPATH": str(stub.parent), "EMBEDFUSE_BUILD_CUDA": "0"}


@pytest.fixture(scope="session")
def make_source(tmp_path_factory):
    def make() -> Path:
        source = tmp_path_factory.mktemp("source") / "embedfuse"
        source.mkdir()
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=BUILT)
            else:
                shutil.copy(ROOT / name, source / name)
        return source

    return make


@pytest.fixture
def build(make_source, environment):
    """Run setup.py on a fresh source tree; (finished process, folder that was built)."""

    def run(*arguments, **variables):
        source = make_source()
        arguments = arguments or ("build", "--build-lib", "built")
        command = [sys.executable, "setup.py", *arguments]
        process = subprocess.run(
            command,
            cwd=source,
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )
        return process, source / ("python" if "--inplace" in arguments else "built")

    return run


@pytest.fixture(scope="session")
def run_with(environment):
    """Output lines of Python where `import embedfuse` finds the given folder's copy alone."""
    site_packages = Path(torch.__file__).parents[1]

    def run(folder: Path, *arguments: str) -> list[str]:
        env = {**environment, "PYTHONPATH": f"{folder}{os.pathsep}{site_packages}"}
        # -S: an editable install adds a finder that would fill in what the copy lacks.
        command = [sys.executable, "-S", *arguments]
        return subprocess.check_output(command, env=env, text=True, cwd=folder).splitlines()

    return run


def run_or_fail(command, cwd, env):
    process = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture(scope="session")
def sdist(make_source, environment, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder]
    run_or_fail(command, make_source(), environment)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def without_optimisation(environment, tmp_path_factory) -> dict[str, str]:
    """The variables of a build whose c++ takes a fifth of the time."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -O0\n')
    script.chmod(0o755)
    return {**environment, "PATH": f"{script.parent}{os.pathsep}{environment['PATH']}"}


@pytest.fixture(scope="session")
def build_wheel(sdist, without_optimisation, tmp_path_factory) -> tuple[Path, bool]:
    """A wheel of the sdist alone, so whatever MANIFEST.in forgets is missing here; and whether pip fetched
    what builds it, setuptools, pybind11 and ninja, for which it needs the package index."""
    folder, environment = tmp_path_factory.mktemp("wheel"), without_optimisation
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("embedfuse-*/"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, "."]
    process = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    isolated = "No matching distribution found for setuptools" not in process.stderr
    if isolated:
        assert process.returncode == 0, process.stdout + process.stderr
    else:
        run_or_fail([*command, "--no-build-isolation"], source, environment)
    return next(folder.glob("*.whl")), isolated


@pytest.fixture(scope="session")
def wheel(build_wheel) -> Path:
    return build_wheel[0]


@pytest.fixture(scope="session")
def cpu_module() -> Path:
    """The compiled module that is installed, which nothing but setup.py builds."""
    try:
        return Path(native.cpu().__file__)
    except native.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory) -> Path:
    """The CUDA module as c++ makes it for the host."""
    return emulated_cuda.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulated(emulated_module):
    """The backend "cuda" on tensors of the CPU."""
    with emulated_cuda.on_cpu_tensors(emulated_cuda.load(emulated_module)):
        yield emulated_module
