"""setup.py's variables: what each does, and how a wrong one fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_missing_compiler_says_what_to_do(build):
    process, _ = build(CXX="no-such-compiler++")
    assert process.returncode != 0
    assert "CXX='no-such-compiler++' is not on the PATH" in process.stderr
    assert "EMBEDFUSE_BUILD_CPP=0" in process.stderr


def test_failing_compiler_fails_the_build(build):
    process, built = build(CXX="false")
    assert process.returncode != 0
    assert "compiling embedfuse._cpu failed" in process.stderr
    assert not list(built.glob("**/*.so"))


@pytest.mark.parametrize("name", ["EMBEDFUSE_BUILD_CPP", "EMBEDFUSE_BUILD_CUDA"])
def test_wrong_flag_value_names_the_accepted_ones(build, name):
    process, _ = build(**{"EMBEDFUSE_BUILD_CPP": "0", name: "yes"})
    assert process.returncode != 0
    assert f"{name}='yes': accepted are 0, 1 and unset" in process.stderr


def test_without_cpp_the_ops_run_on_the_reference_and_doctor_says_why(build, run_with):
    process, built = build(EMBEDFUSE_BUILD_CPP="0")
    assert process.returncode == 0, process.stderr
    assert not list(built.glob("**/*.so"))
    script = (
        "import torch, embedfuse\n"
        "print(embedfuse.__file__)\n"
        "print(embedfuse.ops.pool_normalize(torch.tensor([[[3., 4.]]], dtype=torch.float64)).tolist())\n"
        "with embedfuse.use_backend('cpp'):\n"
        "    try: embedfuse.ops.linear(torch.ones(1, 2), torch.ones(3, 2))\n"
        "    except embedfuse.BackendError as error: print(error)\n"
    )
    lines = run_with(built, "-c", script)
    assert lines[0].startswith(str(built))
    assert lines[1] == "[[0.6, 0.8]]"
    assert "left out by EMBEDFUSE_BUILD_CPP=0" in lines[2]
    facts = json.loads("\n".join(run_with(built, "-m", "embedfuse", "doctor", "--json")))
    for by_backend in facts["ops"].values():
        assert by_backend["reference"] == "yes"
        assert "left out by EMBEDFUSE_BUILD_CPP=0" in by_backend["cpp"]
    assert facts["build"]["cpp"] == "left out by EMBEDFUSE_BUILD_CPP=0"


def test_in_place_build_without_modules(build):
    process, built = build("build_ext", "--inplace", EMBEDFUSE_BUILD_CPP="0")
    assert process.returncode == 0, process.stderr
    assert notes(built)["cpp"] == "left out by EMBEDFUSE_BUILD_CPP=0"
    assert not list(built.glob("**/*.so"))


@pytest.fixture
def counting_compiler(tmp_path):
    """A compiler whose objects are empty, and the file in which it notes their names."""
    script, log = tmp_path / "c++", tmp_path / "compiled"
    script.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do case "$1" in -c) source="$2";; -o) output="$2";; esac; shift; done\n'
        ': > "$output"\n'
        'if [ -n "$source" ]; then\n'
        f'  echo "${{source##*/}}" >> {log}; echo "$output: $source" > "$output.d"\n'
        "fi\n"
    )
    script.chmod(0o755)
    return str(script), log


def test_editable_install_compiles_only_what_changed(make_source, environment, counting_compiler):
    compiler, log = counting_compiler
    source = make_source()

    def compiled():
        log.write_text("")
        command = [sys.executable, "setup.py", "-q", "editable_wheel"]
        subprocess.run(command, cwd=source, env={**environment, "CXX": compiler}, check=True)
        return sorted(log.read_text().split())

    isas = ("avx2", "avx512", "avx512_bf16", "baseline")
    units = ["cpu_module.cpp", "cpu_program.cpp", "cpu_scores.cpp"]
    units += ["dispatch.cpp", "lexical.cpp", "program.cpp"]
    assert compiled() == sorted([*(f"isa_{isa}.cpp" for isa in isas), *units])
    assert compiled() == []
    (source / "csrc" / "cpu" / "lexical.cpp").touch()
    assert compiled() == ["lexical.cpp"]


def notes(built):
    return json.loads((built / "embedfuse" / "_build.json").read_text())


@pytest.fixture
def fake_cuda(tmp_path):
    """A toolkit whose nvcc lists two architectures and compiles nothing."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --list-gpu-arch ]; then echo compute_80; echo compute_90; exit; fi\n'
        "exit 1\n"
    )
    nvcc.chmod(0o755)
    return str(tmp_path / "cuda")


def test_cuda_asked_for_without_nvcc_fails(build, tmp_path):
    process, _ = build(
        EMBEDFUSE_BUILD_CPP="0", EMBEDFUSE_BUILD_CUDA="1", CUDA_HOME=str(tmp_path / "none")
    )
    assert process.returncode != 0
    assert "EMBEDFUSE_BUILD_CUDA=1, but no nvcc: set CUDA_HOME or the PATH" in process.stderr


def test_cuda_is_left_out_without_nvcc(build, tmp_path):
    process, built = build(
        EMBEDFUSE_BUILD_CPP="0", EMBEDFUSE_BUILD_CUDA="", CUDA_HOME=str(tmp_path / "none")
    )
    assert process.returncode == 0, process.stderr
    assert notes(built)["cuda"] == "nvcc was not found"


def test_cuda_that_does_not_compile_is_noted_or_fails_when_asked_for(build, fake_cuda):
    variables = {"EMBEDFUSE_BUILD_CPP": "0", "CUDA_HOME": fake_cuda, "CXX": "false"}
    process, built = build(**variables, EMBEDFUSE_BUILD_CUDA="")
    assert process.returncode == 0, process.stderr
    assert notes(built)["cuda"].startswith("the build failed: compiling embedfuse._cuda failed")
    process, _ = build(**variables, EMBEDFUSE_BUILD_CUDA="1")
    assert process.returncode != 0
    assert "compiling embedfuse._cuda failed" in process.stderr


def test_architectures_that_nvcc_does_not_know_fail(build, fake_cuda):
    process, _ = build(
        EMBEDFUSE_BUILD_CPP="0",
        EMBEDFUSE_BUILD_CUDA="1",
        CUDA_HOME=fake_cuda,
        EMBEDFUSE_CUDA_ARCHS="35;37",
    )
    assert process.returncode != 0
    assert "EMBEDFUSE_CUDA_ARCHS='35;37'" in process.stderr
    assert "does not know 35, 37; it knows 80, 90" in process.stderr


@pytest.mark.parametrize("folder", ["lib64", "targets/x86_64-linux/lib", "lib"])
def test_the_runtime_is_linked_from_where_the_toolkit_has_it(
    make_source, environment, fake_cuda, folder
):
    """An installer's toolkit, a cross-compiler's, and that of the packages on PyPI."""
    runtime, source = Path(fake_cuda, folder, "libcudart_static.a"), make_source()
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    settings = {"EMBEDFUSE_BUILD_CPP": "0", "EMBEDFUSE_BUILD_CUDA": "1", "CUDA_HOME": fake_cuda}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=source, env={**environment, **settings}, capture_output=True)
    (written,) = source.glob("build/*/build.ninja")
    assert f" -L{runtime.parent} -lcudart_static" in written.read_text()
