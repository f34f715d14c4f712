"""A pytest plugin that writes the outcome and figures of each test to a JSON file as they come.

    python -m pytest -p benchmarks.harness.record --results FILE ...

Tests that did not run, or did not end, are listed. In one process a second run with the same FILE continues
the first: tests with an outcome are not run again. With several processes (pytest -n) the first one writes;
a test that takes its process down is a failure there.
"""

import json
import os
import platform
import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness.outcomes import BEGUN, FAILED, NOT_RUN, PASSED

LOAD = os.getloadavg()[0]  # of other processes: this one has done nothing yet
START = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="JSON file of outcomes and figures")


def pytest_configure(config):
    if path := config.getoption("--results"):
        config.pluginmanager.register(Properties(), "result-properties")
        if not is_worker(config):
            config.pluginmanager.register(ResultsFile(path), "results-file")


def is_worker(config) -> bool:
    return hasattr(config, "workerinput")


class Properties:
    """Gives each report what only the process of the test knows: what it covers, and its figures."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        item.user_properties.append(("covers", covered(item)))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        fixture = getattr(item, "funcargs", {}).get("benchmark")
        if call.when == "call" and fixture is not None:
            item.user_properties.append(("figures", dict(fixture.extra_info)))
        report = yield
        if call.when == "teardown" and (lost := lost_context()):
            if is_worker(item.config):
                os._exit(3)  # it would fail all its other tests; another process takes these
            pytest.exit(f"{item.nodeid} lost the GPU's context: {lost}", returncode=3)
        return report


class ResultsFile:
    """The file of one run, rewritten after every test."""

    def __init__(self, path: Path):
        self.path = path
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.machine = machine_info() | stored.get("machine_info", {})
        self.entries = {entry["name"]: entry for entry in stored.get("benchmarks", [])}

    def write(self) -> None:
        content = {"machine_info": self.machine, "benchmarks": list(self.entries.values())}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        written = self.path.with_suffix(".part")
        written.write_text(text + "\n", "utf-8")
        os.replace(written, self.path)

    def entry(self, name: str) -> dict:
        return self.entries.setdefault(name, {"name": name, "outcome": NOT_RUN, "covers": []})

    def pytest_collectreport(self, report):
        if report.failed:
            self.entry(report.nodeid).update(outcome=FAILED, reason=reason(report))
            self.write()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        done = [item for item in items if self.entry(item.nodeid)["outcome"] != NOT_RUN]
        items[:] = [item for item in items if self.entry(item.nodeid)["outcome"] == NOT_RUN]
        config.hook.pytest_deselected(items=done)
        for item in items:
            self.entry(item.nodeid)["covers"] = covered(item)
        self.write()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        for name in ids:
            self.entry(name)

    def pytest_runtest_logstart(self, nodeid):
        self.entry(nodeid)["outcome"] = BEGUN
        self.write()

    def pytest_runtest_logreport(self, report):
        entry, known = self.entry(report.nodeid), dict(report.user_properties)
        entry["covers"] = known.get("covers", entry["covers"])
        if "figures" in known:
            entry["extra_info"] = known["figures"]
        if report.outcome != PASSED:
            entry |= {"outcome": report.outcome, "reason": reason(report)}
        elif report.when == "call":
            entry["outcome"] = PASSED
        if report.when != "setup":
            entry["seconds"] = round(time.monotonic() - START, 1)
            self.write()


def covered(item) -> list[str]:
    """The ops and families of a test: its marks, and its parameters `op`, `version` and `family`."""
    names = {name for mark in item.iter_markers("covers") for name in mark.args}
    params = getattr(getattr(item, "callspec", None), "params", {})
    op = params.get("op") or params.get("version", (None,))[0]
    return sorted(names | {getattr(op, "name", None), params.get("family")} - {None})


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
