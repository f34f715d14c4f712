"""What was red in the archive of an earlier run."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.outcomes import is_red, red_names

TESTS = "tests.json"


@dataclass(frozen=True)
class Red:
    """Names that pytest takes.

    Attributes:
        tests: Tests that failed, or did not end.
        rows: Rows that failed, and those of ops and families whose tests did.
    """

    tests: list[str]
    rows: list[str]


def red(archive: Path) -> Red:
    """What was red; SystemExit where there is no archive."""
    try:
        results = stored(archive)
    except FileNotFoundError as error:
        raise SystemExit(
            f"--last {archive}: no such file; it is results.tgz of an earlier run"
        ) from error
    except tarfile.ReadError as error:
        raise SystemExit(f"--last {archive}: {error}; accepted is results.tgz of a run") from error
    entries = results.pop(TESTS, [])  # none where the tests did not begin
    wrong = red_names(entries)
    rows = [
        entry["name"]
        for of_stage in results.values()
        for entry in of_stage
        if is_red(entry) or wrong & set(entry["covers"])
    ]
    # xdist adds the group of a test to its name.
    tests = [entry["name"].split("@")[0] for entry in entries if is_red(entry)]
    return Red(tests, list(dict.fromkeys(rows)))


def stored(archive: Path) -> dict[str, list[dict]]:
    """The entries of each file of outcomes."""
    found = {}
    with tarfile.open(archive) as files:
        for name in files.getnames():
            if "/" not in name and name.endswith(".json"):
                document = json.load(files.extractfile(name))
                if "benchmarks" in document:
                    found[name] = document["benchmarks"]
    return found
