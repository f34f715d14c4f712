"""What the sdist and the wheel hold, and that a plain `pip install .` works without torch."""

import ast
import subprocess
import sys
import tarfile
import zipfile

import pytest

from embedfuse import config


def test_sdist_holds_the_sources_and_nothing_built(sdist, make_source):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    source = make_source()
    wanted = {
        str(path.relative_to(source))
        for folder in ("csrc", "triton_kernels", "python")
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert {"csrc/cpu/dispatch.cpp", "csrc/include/embedfuse/vec.h"} <= wanted
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml", *wanted} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc", "_build.json"))]


def test_wheel_holds_every_module_and_only_embedfuse(wheel, make_source):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        licence = next(name for name in held if name.endswith("/LICENSE"))
        assert b"Apache License" in archive.read(licence)
    source = make_source()
    modules = {str(p.relative_to(source / "python")) for p in source.glob("python/**/*.py")}
    kernels = {f"embedfuse/{p.relative_to(source)}" for p in source.glob("triton_kernels/**/*.*")}
    assert "embedfuse/triton_kernels/__init__.py" in kernels
    assert modules | kernels <= held
    files = modules | {name for name in kernels if name.endswith(".py")}
    assert {name for name in held if name.endswith(".py")} == files
    assert [name for name in held if name.startswith("embedfuse/_cpu.") and name.endswith(".so")]
    assert "embedfuse/_build.json" in held
    assert {name.split("/")[0].split("-")[0] for name in held} == {"embedfuse"}


def test_the_wheel_was_built_where_torch_cannot_be_imported(wheel, environment):
    process = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True
    )
    assert "the build imported torch" in process.stderr


def test_wheel_works_and_notes_how_it_was_built(wheel, run_with, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import embedfuse, torch; from embedfuse import native\n"
        "print(embedfuse.__file__); print(native.build_notes())\n"
        "with embedfuse.use_backend('cpp'):\n"
        "    print(embedfuse.ops.pool_normalize(torch.tensor([[[3., 4.], [3., 4.]]])).tolist())"
    )
    lines = run_with(tmp_path, "-c", script)
    assert lines[0].startswith(str(tmp_path))
    notes = {"cpp": "built with c++", "cuda": "left out by EMBEDFUSE_BUILD_CUDA=0"}
    assert ast.literal_eval(lines[1]) == notes
    assert lines[2] == str([[0.6000000238418579, 0.800000011920929]])


def test_the_wheel_was_built_in_isolation(build_wheel):
    if not build_wheel[1]:
        pytest.skip("no package index in reach")


def test_the_wheel_installs_without_torch(wheel, environment, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    env = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    command = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel]
    subprocess.run(command, env=env, check=True)
    # The package itself needs torch; its C++ module does not.
    script = (
        "import importlib.util, glob, sysconfig\n"
        "path, = glob.glob(sysconfig.get_path('platlib') + '/embedfuse/_cpu*.so')\n"
        "spec = importlib.util.spec_from_file_location('_cpu', path)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(importlib.util.find_spec('torch'), module.supported_isas()[-1])"
    )
    got = subprocess.check_output([python, "-c", script], text=True, cwd=tmp_path)
    assert got.split() == ["None", config.CPU_ISAS[-1]]
    assert (tmp_path / "venv" / "bin" / "embedfuse").exists()
