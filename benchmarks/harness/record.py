"""A pytest plugin that writes the outcome and figures of each test to a JSON file as they come.

    python -m pytest -p benchmarks.harness.record --results FILE [--budget SECONDS] [--correctness FILE] ...

Every test is in FILE before the first one runs, so a crash loses no result and tests that did not run are
listed. A second run with the same FILE continues the first: tests with an outcome are not run again.
"""

import json
import os
import platform
import time
from pathlib import Path

import pytest
import torch

LOAD = os.getloadavg()[0]  # of other processes: this one has done nothing yet
START = time.monotonic()
# A test that has begun and not ended crashed the process, or was stopped by a time limit.
NOT_RUN, BEGUN, PASSED, FAILED, SKIPPED = "not run", "begun", "passed", "failed", "skipped"


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="JSON file of outcomes and figures")
    parser.addoption("--budget", type=float, help="seconds after which no test begins")
    parser.addoption(
        "--correctness",
        type=Path,
        help="JSON file of ops and families; benchmarks of failed ones are skipped",
    )


def pytest_configure(config):
    if path := config.getoption("--results"):
        config.pluginmanager.register(ResultsFile(config, path), "results-file")


class ResultsFile:
    """The file of one run, rewritten after every test."""

    def __init__(self, config, path: Path):
        self.path = path
        self.budget = config.getoption("--budget")
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.machine = machine_info() | stored.get("machine_info", {})
        self.entries = {entry["name"]: entry for entry in stored.get("benchmarks", [])}
        correctness = config.getoption("--correctness")
        known = correctness is not None and correctness.exists()
        self.wrong = failed_names(json.loads(correctness.read_text())) if known else []

    def write(self) -> None:
        content = {"machine_info": self.machine, "benchmarks": list(self.entries.values())}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        written = self.path.with_suffix(".part")
        written.write_text(text + "\n", "utf-8")
        os.replace(written, self.path)

    def pytest_collectreport(self, report):
        if report.failed:
            entry = {"outcome": FAILED, "covers": [], "reason": reason(report)}
            self.entries[report.nodeid] = {"name": report.nodeid, **entry}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        done = [item for item in items if self.outcome(item) != NOT_RUN]
        items[:] = [item for item in items if self.outcome(item) == NOT_RUN]
        config.hook.pytest_deselected(items=done)
        for item in items:
            entry = {"name": item.nodeid, "outcome": NOT_RUN, "covers": covered(item)}
            self.entries.setdefault(item.nodeid, entry)
        self.write()

    def outcome(self, item) -> str:
        return self.entries.get(item.nodeid, {}).get("outcome", NOT_RUN)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if self.budget is not None and time.monotonic() - START > self.budget:
            pytest.exit(f"the time is over: {self.budget:.0f} s", returncode=0)
        if wrong := [name for name in covered(item) if name in self.wrong]:
            pytest.skip(f"failed in the tests: {', '.join(wrong)}")
        self.entries[item.nodeid]["outcome"] = BEGUN
        self.write()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        entry = self.entries[item.nodeid]
        if report.outcome != PASSED:
            entry |= {"outcome": report.outcome, "reason": reason(report)}
        elif report.when == "call":
            entry["outcome"] = PASSED
            if fixture := getattr(item, "funcargs", {}).get("benchmark"):
                entry["extra_info"] = dict(fixture.extra_info)
        if report.when == "teardown":
            entry["seconds"] = round(time.monotonic() - START, 1)
            self.write()
            if lost := lost_context():
                pytest.exit(f"{item.nodeid} lost the GPU's context: {lost}", returncode=3)
        return report


def covered(item) -> list[str]:
    """The ops and families of a test: its marks, and its parameters `op`, `version` and `family`."""
    names = {name for mark in item.iter_markers("covers") for name in mark.args}
    params = getattr(getattr(item, "callspec", None), "params", {})
    op = params.get("op") or params.get("version", (None,))[0]
    return sorted(names | {getattr(op, "name", None), params.get("family")} - {None})


def verdicts(entries: list[dict]) -> dict[str, str]:
    """Failed, passed or not run, by op or family; by file for tests that name neither."""
    outcomes: dict[str, set] = {}
    for entry in entries:
        for name in entry["covers"] or [Path(entry["name"].split("::")[0]).stem]:
            outcomes.setdefault(name, set()).add(entry["outcome"])
    return {name: verdict(of_name) for name, of_name in sorted(outcomes.items())}


def verdict(outcomes: set[str]) -> str:
    if outcomes & {FAILED, BEGUN}:
        return FAILED
    return PASSED if PASSED in outcomes else NOT_RUN


def failed_names(correctness: dict[str, str]) -> list[str]:
    return [name for name, outcome in correctness.items() if outcome == FAILED]


def reason(report) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr))[:400]


def one_line(error: Exception) -> str:
    """Type and first line of the message."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def lost_context() -> str | None:
    """The error of a GPU that an illegal access made unusable: every later call of the process fails."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def machine_info() -> dict:
    from embedfuse.cli.doctor import cpu

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or cpu()["name"],
        "machine": platform.machine(),
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": LOAD,
    }
