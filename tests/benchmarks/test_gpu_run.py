"""`make gpu` without a GPU: the parts, the results file, and what happens when a test fails or crashes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.gpu import run as gpu
from benchmarks.harness import record

ROOT = Path(__file__).parents[2]
SUITE = """
import os
import time
import pytest

@pytest.mark.covers("sound")
def test_figures(benchmark):
    benchmark.extra_info["seconds"] = 0.5
    benchmark.pedantic(lambda: None)

@pytest.mark.parametrize("family", ["crashing"])
def test_crash(family):
    os._exit(11)

@pytest.mark.covers("wrong")
def test_fails():
    assert 1 == 2, "one is not two"

@pytest.mark.covers("sound")
def test_last():
    with open("runs", "a") as file:
        file.write("x")

def test_skipped():
    pytest.skip("the peer is not installed")
"""


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Path:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = covers\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu, "PYTEST", [*gpu.PYTEST, "--rootdir", str(tmp_path)])
    return tmp_path


def outcomes(entries: list[dict]) -> dict[str, str]:
    return {entry["name"].split("::")[1]: entry["outcome"] for entry in entries}


def test_a_crash_loses_no_other_result(suite, capsys):
    end = time.monotonic() + 100
    entries = gpu.run_pytest(["test_suite.py"], suite, "speed", end)
    assert outcomes(entries) == {
        "test_figures": "passed",
        "test_crash[crashing]": "begun",
        "test_fails": "failed",
        "test_last": "passed",
        "test_skipped": "skipped",
    }
    assert entries[0]["extra_info"] == {"seconds": 0.5}
    assert "one is not two" in entries[2]["reason"]
    assert entries[4]["reason"] == "the peer is not installed"
    assert (suite / "runs").read_text() == "x"  # once, though pytest ran twice
    printed = capsys.readouterr().out
    assert (
        "did not end (a crash, or the time was over): test_suite.py::test_crash[crashing]"
        in printed
    )
    assert "skipped: test_suite.py::test_skipped the peer is not installed" in printed
    expected = {"sound": "passed", "crashing": "failed", "wrong": "failed", "test_suite": "not run"}
    assert record.verdicts(entries) == expected
    stored = json.loads((suite / "speed.json").read_text())
    assert stored["benchmarks"] == entries
    assert stored["machine_info"]["threads"] >= 1


def pytest_run(folder: Path, *arguments: str) -> list[dict]:
    results = folder / "run.json"
    command = [*gpu.PYTEST, "--results", str(results), *arguments, "test_suite.py"]
    subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    return json.loads(results.read_text())["benchmarks"]


def test_ops_that_failed_are_not_timed(suite):
    (suite / "correctness.json").write_text('{"sound": "failed", "crashing": "not run"}')
    gate = ["--correctness", "correctness.json"]
    entries = pytest_run(suite, *gate, "--deselect", "test_suite.py::test_crash")
    assert outcomes(entries)["test_figures"] == outcomes(entries)["test_last"] == "skipped"
    assert entries[0]["reason"] == "failed in the tests: sound"
    assert outcomes(entries)["test_fails"] == "failed"
    assert not (suite / "runs").exists()


def test_no_test_begins_after_the_budget(suite):
    entries = pytest_run(suite, "--budget", "0")
    assert set(outcomes(entries).values()) == {"not run"}
    assert len(entries) == 5


def test_a_process_that_hangs_is_killed_with_its_children(tmp_path, capsys):
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    code = gpu.run_logged([sys.executable, "-c", child], tmp_path / "log.txt", start + 2)
    assert code == -9
    assert time.monotonic() - start < 20
    assert (tmp_path / "log.txt").read_text() == "begun\n"
    assert "s] begun" in capsys.readouterr().out


@pytest.fixture
def parts(monkeypatch) -> list[str]:
    """The names of the parts that ran; that of the sanitizer raises, that of the models fails."""
    ran = []

    def part(name, out, end):
        ran.append(name)
        if name == "sanitizer":
            raise RuntimeError("boom")
        return name != "models"

    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(gpu.PARTS, part))
    monkeypatch.setattr(gpu, "describe", lambda out: None)
    return ran


def test_a_part_that_fails_does_not_stop_the_next(parts, tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "new")]) == 1
    assert parts == ["tests", "sanitizer", "models", "kernels"]
    printed = capsys.readouterr().out
    assert "sanitizer: RuntimeError: boom" in printed
    assert "failed: sanitizer, models" in printed


def test_parts_by_name(parts, tmp_path):
    assert main(["gpu", "--out", str(tmp_path), "tune", "kernels"]) == 0
    assert parts == ["tune", "kernels"]
    with pytest.raises(SystemExit, match="accepted are tests, sanitizer, models, kernels, tune"):
        main(["gpu", "--out", str(tmp_path), "kernel"])


def test_tune_is_the_command_of_that_name(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(gpu, "run_logged", lambda command, *_: called.append(command) or 0)
    assert gpu.run_tune("tune", tmp_path, time.monotonic() + 100.2)
    assert called[0][1:4] == ["-m", "benchmarks", "tune"]
    # The results go to `out`, and the time that is left is passed on.
    assert called[0][4:] == ["--budget", "100", "--out", str(tmp_path / "configs")]


def test_a_file_that_cannot_be_collected_stops_no_other(suite):
    (suite / "test_broken.py").write_text("import gnome_that_is_not_installed")
    end = time.monotonic() + 100
    entries = gpu.run_pytest(["."], suite, "tests", end)
    found = {entry["name"]: entry["outcome"] for entry in entries}
    assert found["test_broken.py"] == "failed"
    assert found["test_suite.py::test_last"] == "passed"
    assert record.verdicts(entries)["test_broken"] == "failed"


def test_nothing_is_right_where_nothing_ran(monkeypatch, tmp_path):
    entries = [{"name": "a.py::test_1", "covers": ["rope_"], "outcome": "not run"}]
    monkeypatch.setattr(gpu, "run_pytest", lambda *_: entries)
    assert not gpu.run_tests("tests", tmp_path, 0.0)


def test_tests_write_what_is_right(monkeypatch, tmp_path):
    entries = [
        {"name": "a.py::test_1", "covers": ["rope_"], "outcome": "passed"},
        {"name": "a.py::test_2", "covers": ["rope_", "maxsim"], "outcome": "failed"},
        {"name": "a.py::test_3", "covers": ["bert"], "outcome": "skipped"},
    ]
    monkeypatch.setattr(gpu, "run_pytest", lambda *_: entries)
    assert not gpu.run_tests("tests", tmp_path, 0.0)
    found = json.loads((tmp_path / "correctness.json").read_text())
    assert found == {"bert": "not run", "maxsim": "failed", "rope_": "failed"}


@pytest.mark.parametrize(
    ("name", "outcome", "fine"),
    [
        ("a.py::test_x[torch]", "begun", False),
        ("a.py::test_x", "failed", False),
        ("a.py::test_x[other_libraries]", "begun", True),
        ("a.py::test_x[other_libraries]", "failed", True),
        ("a.py::test_x", "not run", True),
    ],
)
def test_failures_of_other_libraries_do_not_fail_the_part(
    monkeypatch, tmp_path, name, outcome, fine
):
    entries = [{"name": "a.py::test_1", "outcome": "passed"}, {"name": name, "outcome": outcome}]
    monkeypatch.setattr(gpu, "run_pytest", lambda *_: entries)
    monkeypatch.setattr(gpu, "run_logged", lambda *_: 0)
    assert gpu.run_speed("kernels", tmp_path, 0.0) == fine


FAKE_SANITIZER = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$2" in
  racecheck) echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"; exit 9;;
  initcheck) exit 0;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_sanitizer(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    assert not gpu.run_sanitizer("sanitizer", tmp_path, time.monotonic() + 60)
    assert json.loads((tmp_path / "sanitizer.json").read_text()) == {
        "memcheck cuda": "passed: 0 errors",
        "racecheck cuda": "failed: 1 hazard displayed (1 error, 0 warnings)",
        "initcheck cuda": "failed: ended with 0",  # and reported nothing: it did not look
        "memcheck triton": "passed: 0 errors",
    }
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4
    assert "--kernel-name kernel_substring=embedfuse" in calls[1]
    assert calls[3].endswith("-m benchmarks.gpu.sanitize triton")


def test_a_missing_sanitizer_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    assert gpu.run_sanitizer("sanitizer", tmp_path, 0.0)
    assert "compute-sanitizer is neither on the PATH" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_run(tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert main(["gpu", "--out", str(tmp_path), "tests"]) == 2
    assert "`make bench` makes the same report for the CPU" in capsys.readouterr().out
    assert json.loads((tmp_path / "doctor.json").read_text())["versions"]
