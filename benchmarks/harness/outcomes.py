"""Outcomes of tests as benchmarks/harness/record.py stores them. Imports no torch."""

import json
from collections.abc import Iterable
from pathlib import Path

# A test that has begun and not ended crashed the process, or was stopped by a time limit.
NOT_RUN, BEGUN, PASSED, FAILED, SKIPPED = "not run", "begun", "passed", "failed", "skipped"


def entries_of(path: Path) -> list[dict]:
    """The stored entries; none where nothing was stored."""
    return json.loads(path.read_text("utf-8"))["benchmarks"] if path.exists() else []


def is_red(entry: dict) -> bool:
    return entry["outcome"] in (FAILED, BEGUN)


def subjects(entry: dict) -> list[str]:
    """The ops and families that a test is about; its file where it names none."""
    return entry["covers"] or [Path(entry["name"].split("::")[0]).stem]


def red_names(entries: Iterable[dict]) -> set[str]:
    """Ops and families of red tests."""
    return {name for entry in entries if is_red(entry) for name in subjects(entry)}


def verdicts(entries: Iterable[dict]) -> dict[str, str]:
    """Failed, passed or not run, by op or family."""
    outcomes: dict[str, set] = {}
    for entry in entries:
        for name in subjects(entry):
            outcomes.setdefault(name, set()).add(FAILED if is_red(entry) else entry["outcome"])
    return {
        name: next((o for o in (FAILED, PASSED) if o in found), NOT_RUN)
        for name, found in sorted(outcomes.items())
    }
