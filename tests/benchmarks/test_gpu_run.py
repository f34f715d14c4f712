"""`make gpu` without a GPU: a stage that hangs, crashes or is red stops no other; a kill loses nothing."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.gpu import run as gpu
from benchmarks.gpu import stages, summary
from benchmarks.gpu.archive import Archive
from benchmarks.gpu.limits import KILLED, run_limited
from benchmarks.gpu.stages import Stage
from tests.benchmarks.gpu_stages import HANG, PLAN, stage

ROOT = Path(__file__).parents[2]


def runs(folder: Path) -> bool:
    """Whether the child of HANG does, some seconds after it was killed."""
    state = Path("/proc", (folder / "pid").read_text(), "stat")
    until = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":
        if time.monotonic() > until:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    return work, out


def test_a_stage_that_hangs_is_cut_and_the_rest_goes_on(folders, capsys):
    work, out = folders
    begun = time.monotonic()
    with Archive(work, out / "results.tgz"):
        results = gpu.run_stages(PLAN, work, out, 20.0, {})
    assert time.monotonic() - begun < 20
    assert {r.stage.name: r.state for r in results} == {
        "sound": "passed",
        "hangs": "cut at its limit",
        "crashes": "crashed, exit status 11",
        "red": "red",
        "last": "passed",
    }
    assert 2 <= results[1].took < 5
    assert not runs(work)
    text = (out / "summary.md").read_text()
    for result in results:
        assert f"| {result.stage.name} | {result.state} | " in text
        assert f"## {result.stage.name}\n\ntable of {result.stage.name}" in text
        assert (
            f"=== {result.stage.name}, at most" in capsys.readouterr().out or result != results[0]
        )
    with tarfile.open(out / "results.tgz") as archive:
        assert archive.extractfile("written.txt").read() == b"figures"
        assert b"still here" in archive.extractfile("last.txt").read()
        assert archive.extractfile("summary.md").read().decode() == text


def test_without_time_the_rest_is_named(folders):
    work, out = folders
    results = gpu.run_stages([stage("hangs", 1.0, HANG), PLAN[-1]], work, out, 2.0, {})
    assert [r.state for r in results] == ["cut at its limit", "no time left"]
    assert "| last | no time left | 0.0 | 0 |" in (out / "summary.md").read_text()


RUN = """
import sys
from pathlib import Path
from benchmarks.gpu import run
from benchmarks.gpu.archive import Archive
from tests.benchmarks import gpu_stages as cases
work, out = Path(sys.argv[1]), Path(sys.argv[2])
plan = [cases.PLAN[0], cases.stage("hangs", None, "import time; time.sleep(60)")]
run.end_on_signals()
with Archive(work, out / "results.tgz", seconds=0.2):
    run.run_stages(plan, work, out, 60.0, {})
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_loses_nothing(folders, sent):
    work, out = folders
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    process = subprocess.Popen([sys.executable, "-c", RUN, str(work), str(out)], env=environment)
    until = time.monotonic() + 60
    while "hangs | runs" not in (text := stored(out).get("summary.md", "")):
        assert time.monotonic() < until, text
        time.sleep(0.1)
    process.send_signal(sent)
    assert process.wait(20) in (-signal.SIGKILL, 128 + signal.SIGTERM)
    hung = subprocess.run(["pgrep", "-f", f"time.sleep.60. {work}"], capture_output=True, text=True)
    for child in hung.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    assert bool(hung.stdout) == (sent == signal.SIGKILL)  # SIGTERM ends the stages too
    found = stored(out)
    assert found["written.txt"] == "figures"
    assert "| sound | passed |" in found["summary.md"]
    assert "results.tgz" in {path.name for path in out.iterdir()}


def stored(out: Path) -> dict[str, str]:
    path = out / "results.tgz"
    if not path.exists():
        return {}
    with tarfile.open(path) as archive:
        return {name: archive.extractfile(name).read().decode() for name in archive.getnames()}


def test_a_process_is_killed_with_its_children(tmp_path):
    log, start = tmp_path / "log.txt", time.monotonic()
    code = f"print('begun', flush=True){HANG}"
    assert run_limited([sys.executable, "-c", code, str(tmp_path)], log, 2.0, {}) == KILLED
    assert time.monotonic() - start < 10
    assert not runs(tmp_path)
    assert log.read_text().endswith("\nbegun\n")


SUITE = """
import os
import pytest

@pytest.mark.covers("sound")
def test_figures(benchmark):
    benchmark.extra_info["rows"] = {"a row": {"value": 0.5, "unit": "ms"}}
    benchmark.pedantic(lambda: None)

@pytest.mark.parametrize("family", ["crashing"])
def test_crash(family):
    os._exit(11)

@pytest.mark.covers("wrong")
def test_fails(benchmark):
    benchmark.extra_info["rows"] = {"a wrong row": {"value": 2.0, "unit": "ms"}}
    benchmark.pedantic(lambda: None)
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
    monkeypatch.setattr("benchmarks.gpu.limits.ROOT", tmp_path)
    return tmp_path


def outcomes(folder: Path, name: str) -> dict[str, str]:
    entries = json.loads((folder / f"{name}.json").read_text())["benchmarks"]
    return {entry["name"].split("::")[-1]: entry["outcome"] for entry in entries}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_test_that_crashes_loses_no_other_result(suite, processes):
    """One process is begun again after the test; of several, another one goes on."""
    options = ["-n", "2"] if processes == 2 else []

    def commands(work, seconds):
        return [stages.pytest(work, "tests", *options, "--rootdir", str(suite), "test_suite.py")]

    state = gpu.run_stage(
        Stage("tests", 1.0, commands, summary.tests, processes == 1), suite, 100.0, {}
    )
    assert state in ("red", "passed")
    assert outcomes(suite, "tests") == {
        "test_figures": "passed",
        "test_crash[crashing]": "begun" if processes == 1 else "failed",
        "test_fails": "failed",
        "test_last": "passed",
        "test_skipped": "skipped",
    }
    assert (suite / "runs").read_text() == "x"  # once, though pytest ran twice
    text = summary.tests(suite)
    assert "- failed: crashing, wrong\n" in text
    assert "- passed: sound\n" in text
    assert "one is not two" in text
    (suite / "rows.json").write_text((suite / "tests.json").read_text())
    rows = summary.rows(suite, "rows")
    assert "| a row | ms | 0.5 |" in rows
    wrong = next(line for line in rows.splitlines() if line.startswith("| a wrong row | ms | 2 |"))
    assert wrong.endswith("| wrong, this row |")
    assert "- skipped: the peer is not installed (1)" in rows


def test_a_file_that_cannot_be_collected_stops_no_other(suite):
    (suite / "test_broken.py").write_text("import gnome_that_is_not_installed")
    (suite / "test_suite.py").write_text("def test_last(): pass")
    log = suite / "log.txt"
    assert (
        run_limited(stages.pytest(suite, "tests", "."), log, 100.0, {"PYTHONPATH": str(ROOT)}) == 1
    )
    assert outcomes(suite, "tests") == {"test_broken.py": "failed", "test_last": "passed"}


def archive_of(folder: Path, out: Path, **files: list[dict]) -> Path:
    for name, entries in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"benchmarks": entries}))
    Archive(folder, out / "results.tgz").write()
    return out / "results.tgz"


def test_retry_runs_what_was_red_and_its_rows(folders):
    work, out = folders
    named = {"outcome": "passed", "covers": []}
    tests = [
        {**named, "name": "tests/gpu/a.py::test_1", "covers": ["rope_"]},
        {
            **named,
            "name": "tests/gpu/a.py::test_2[x]@memory",
            "covers": ["maxsim"],
            "outcome": "failed",
        },
    ]
    rows = [
        {**named, "name": "rows.py::test_maxsim", "covers": ["maxsim"]},
        {**named, "name": "rows.py::test_rope", "covers": ["rope_"]},
        {**named, "name": "rows.py::test_bert", "covers": ["bert"], "outcome": "begun"},
    ]
    archive = archive_of(work, out, tests=tests, kernels=rows, doctor=[])
    plan = {stage.name: stage.commands(work, 10.0)[0] for stage in stages.retry(archive, "")}
    assert list(plan) == ["machine", "tests", "sanitizer", "rows"]
    assert plan["tests"][-1] == "tests/gpu/a.py::test_2[x]"
    at = plan["rows"].index("-k")
    assert plan["rows"][at - 2 : at] == ["rows.py::test_maxsim", "rows.py::test_bert"]
    by_name = {
        stage.name: stage.commands(work, 10.0)[0] for stage in stages.retry(archive, "scatter")
    }
    assert by_name["rows"][-4:] == [stages.KERNELS, stages.MODELS, "-k", "scatter"]
    green = archive_of(work, out, tests=tests[:1], kernels=[], doctor=[])
    assert [stage.name for stage in stages.retry(green, "")] == ["machine", "sanitizer"]


def test_retry_without_an_archive_says_so(folders):
    _, out = folders
    with pytest.raises(SystemExit, match=r"no such file; it is results\.tgz of an earlier run"):
        main(["gpu", "retry", "--out", str(out)])
    (out / "notes.txt").write_text("no archive")
    with pytest.raises(SystemExit, match=r"accepted is results\.tgz of a run"):
        main(["gpu", "retry", "--last", str(out / "notes.txt"), "--out", str(out)])


def test_retry_of_a_run_whose_tests_did_not_begin(folders):
    work, out = folders
    red = {"name": "rows.py::test_bert", "covers": [], "outcome": "failed"}
    plan = stages.retry(archive_of(work, out, kernels=[red]), "")
    assert [stage.name for stage in plan] == ["machine", "sanitizer", "rows"]


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--rows", "x"], ["--last", "x"]])
def test_arguments_that_would_be_ignored(tmp_path, arguments):
    with pytest.raises(SystemExit, match="accepted"):
        main(["gpu", "--out", str(tmp_path), *arguments])


def test_a_file_that_shrinks_breaks_no_archive(folders, monkeypatch):
    work, out = folders
    (work / "a.txt").write_text("long" * 1000)
    (work / "b.txt").write_text("whole")
    told = tarfile.TarFile.gettarinfo

    def shrinks(self, *args, **kwargs):
        info = told(self, *args, **kwargs)
        (work / "a.txt").write_text("short")
        return info

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", shrinks)
    Archive(work, out / "results.tgz").write()
    assert stored(out) == {"a.txt": "short", "b.txt": "whole"}


def test_the_shares_leave_no_stage_without_time():
    shares = [stage.share for stage in stages.RUN]
    assert 0.9 < sum(share for share in shares if share is not None) <= 1
    assert shares[-3:] == [None] * 3


def test_without_a_gpu_it_says_what_to_run(tmp_path, monkeypatch, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    monkeypatch.setattr(stages, "RUN", stages.RUN[:2])
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    assert "no GPU to run on; `make gpu PART=rehearse` runs without one" in capsys.readouterr().out
    assert "| tests | not begun |" in (tmp_path / "summary.md").read_text()
