"""The command line: doctor's content as text and JSON, and how commands are found."""

import importlib
import json
import platform
import subprocess
import sys

import pytest
import torch

import embedfuse
from embedfuse import config, native
from embedfuse.cli import COMMANDS, doctor, main
from embedfuse.registry import OPS

NO_GPU = (
    "no CUDA device is visible"
    if torch.version.cuda
    else f"torch {torch.__version__} is built without CUDA"
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the answer without a GPU")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in config.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def facts(capsys):
    def call():
        assert main(["doctor", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_doctor_versions(facts, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", (*doctor.PACKAGES, "embedfuse-no-such-package"))
    versions = facts()["versions"]
    assert versions["python"] == platform.python_version()
    # The installed package of a CUDA build leaves the local part out.
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["embedfuse-no-such-package"] == "not installed"


def test_doctor_cpu(facts):
    cpu = facts()["cpu"]
    assert cpu["name"]
    assert cpu["torch threads"] == str(torch.get_num_threads())
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.system() == "Linux" and capability in ("AVX2", "AVX512"):
        assert cpu["avx2"] == "yes"
        # ATEN_CPU_CAPABILITY may keep torch below what the processor has.
        assert cpu["avx512f"] == "yes" or capability == "AVX2"
    assert cpu["supported ISAs"].split(", ") == native.cpu().supported_isas()
    assert cpu["ISA in use"] == native.cpu().selected_isa()


@without_gpu
def test_doctor_says_for_each_op_which_backend_runs_or_why_not(facts):
    found = facts()
    assert found["gpu"] == {"none": NO_GPU}
    assert set(found["ops"]) == set(OPS)
    assert found["ops"]["pool_normalize"]["reference"] == "yes"
    assert found["ops"]["pool_normalize"]["cpp"] == "yes"
    assert found["ops"]["pool_normalize"]["triton"] == NO_GPU
    assert found["ops"]["linear"]["triton"] == "this op has no such version"
    assert list(found["attention on CUDA"]) == ["float32", "float16", "bfloat16"]
    assert all(set(x.values()) == {NO_GPU} for x in found["attention on CUDA"].values())


@pytest.mark.parametrize(
    "error",
    [native.Unavailable("left out by the packager"), ValueError("EMBEDFUSE_CPU_ISA='sse': no")],
)
def test_doctor_tells_why_the_module_cannot_be_used(facts, monkeypatch, error):
    def missing():
        raise error

    monkeypatch.setattr(native, "cpu", missing)
    found = facts()
    assert found["ops"]["linear"]["cpp"] == str(error)
    assert found["ops"]["linear"]["reference"] == "yes"
    assert found["cpu"]["ISA in use"] == str(error)


def test_doctor_tells_what_the_build_noted(facts, monkeypatch):
    assert facts()["build"] == native.build_notes()
    monkeypatch.setattr(native, "build_notes", dict)
    assert facts()["build"] == {"note": "this copy of embedfuse was not built"}


def test_doctor_environment(facts, monkeypatch):
    monkeypatch.setenv("EMBEDFUSE_CPU_ISA", "baseline")
    monkeypatch.setenv("EMBEDFUSE_BACKEND", "opencl")
    environment = facts()["environment"]
    assert set(environment) == set(config.VARIABLES)
    assert environment["EMBEDFUSE_CPU_ISA"] == {
        "value": "baseline",
        "meaning": config.VARIABLES["EMBEDFUSE_CPU_ISA"].meaning,
        "accepted": "amx, avx512_bf16, avx512, avx2, baseline",
        "default": "the best that the processor has",
    }
    assert environment["EMBEDFUSE_BUILD_CPP"]["value"] is None
    assert "'opencl': accepted are" in environment["EMBEDFUSE_BACKEND"]["error"]


def values(node):
    if isinstance(node, dict):
        return [value for child in node.values() for value in values(child)]
    return [] if node is None else [node]


def test_doctor_text_holds_all_that_the_json_holds(facts, capsys, monkeypatch):
    monkeypatch.setenv("EMBEDFUSE_BACKEND", "opencl")
    found = facts()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert len(values(found)) > 40
    names = [name for section in found.values() for name in section]
    assert [part for part in (*names, *values(found)) if part not in text] == []
    lines = text.splitlines()
    row = next(line for line in lines if line.split()[:1] == ["linear"])
    assert row.split(maxsplit=2) == ["linear", "computes", OPS["linear"].meaning]
    following = lines[lines.index(row) + 1 :]
    assert [line.split() for line in following[:2]] == [["reference", "yes"], ["cpp", "yes"]]


def test_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["serve"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "'serve'" in error
    assert all(name in error for name in COMMANDS)


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(f"{name} {meaning}" in error for name, meaning in COMMANDS.items())


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"embedfuse {embedfuse.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_is_there(name, capsys):
    command = importlib.import_module(f"embedfuse.cli.{name}")
    assert callable(command.run)
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    assert f"usage: embedfuse {name}" in capsys.readouterr().out


def test_module_runs_and_loads_only_the_command_asked_for():
    script = (
        "import runpy, sys; sys.argv = ['embedfuse', 'doctor', '--json']\n"
        "try: runpy.run_module('embedfuse', run_name='__main__')\n"
        "except SystemExit as exit: code = exit.code\n"
        "others = {'embedfuse.cli.demo', 'transformers'} & set(sys.modules)\n"
        "print(code, sorted(others), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["ops"]["pool_normalize"]["reference"] == "yes"
    assert run.stderr.strip() == "0 []"
