"""What `make gpu` does, in this order: the commands of each stage, its share of the time, and its table."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import last, summary

KERNELS = "benchmarks/gpu/test_gpu_kernels.py"
MODELS = "benchmarks/gpu/test_gpu_models.py"
CURVES = "benchmarks/models/test_curves.py"
TUNED = "maxsim or all_pairs or info_nce or siglip"
WORKERS = max(2, min(14, (os.cpu_count() or 2) - 2))
OTHERS = "other_libraries"

Commands = Callable[[Path, float], list[list[str]]]


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: Of the stage, its log and its files.
        share: Of the whole time: its limit. None: what is left when it begins.
        commands: (folder for its files, its seconds) -> commands, run one after the other.
        table: Folder of the files -> what is shown of the results, in Markdown.
        resumes: Whether a command whose process died is run again, as long as it gets further.
    """

    name: str
    share: float | None
    commands: Commands
    table: Callable[[Path], str]
    resumes: bool = False


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def pytest(work: Path, name: str, *arguments: str) -> list[str]:
    """Writes outcomes and figures to name.json; what its process did not get to, a second call continues."""
    return python(
        *(
            "pytest",
            "-q",
            "--tb=short",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
        ),
        *("-p", "benchmarks.harness.record", "--results", str(work / f"{name}.json"), *arguments),
    )


def rows(
    name: str, share: float | None, tests: Sequence[str], keep: str = "", tuned: bool = False
) -> Stage:
    """A stage that times tests, of files or by name, that pytest's -k keeps.

    tuned: with the configs that stage `tune` found.
    """

    def commands(work: Path, seconds: float) -> list[list[str]]:
        configs = ["--configs", str(work / "configs")] if tuned else []
        return [pytest(work, name, "--benchmark-only", *tests, "-k", keep, *configs)]

    return Stage(name, share, commands, functools.partial(summary.rows, name=name), resumes=True)


def machine(work: Path, seconds: float) -> list[list[str]]:
    return [python("benchmarks.gpu.machine", str(work))]


def correctness(work: Path, seconds: float, *names: str) -> list[list[str]]:
    # Tests that need much memory are one group, which one process runs.
    return [
        pytest(work, "tests", "-n", str(WORKERS), "--dist", "loadgroup", *(names or ["tests/gpu"]))
    ]


def tune(work: Path, seconds: float) -> list[list[str]]:
    budget = f"{0.9 * seconds:.0f}"
    return [
        python(
            "benchmarks", "tune", "--headline", "--budget", budget, "--out", str(work / "configs")
        )
    ]


def profile(work: Path, seconds: float) -> list[list[str]]:
    return [python("benchmarks.gpu.profile", str(work))]


def sanitizer(work: Path, seconds: float) -> list[list[str]]:
    return [python("benchmarks.gpu.sanitize", str(work), f"{0.9 * seconds:.0f}")]


RUN = [
    Stage("machine", 0.06, machine, summary.machine),
    Stage("tests", 0.18, correctness, summary.tests),
    rows("kernels", 0.13, (KERNELS,), f"not {OTHERS}"),
    rows("bge-m3", 0.15, (MODELS,), f"BGE-M3 and not {OTHERS}"),
    rows("e5-mistral", 0.17, (MODELS,), f"E5-mistral and not {OTHERS}"),
    rows("bert", 0.05, (MODELS,), f"BERT-base and not {OTHERS}"),
    Stage("tune", 0.14, tune, summary.configs),
    rows("tuned", 0.07, (KERNELS,), f"({TUNED}) and not {OTHERS}", tuned=True),
    Stage("profile", 0.04, profile, summary.profile),
    # What follows takes what is left.
    Stage("sanitizer", None, sanitizer, summary.sanitizer),
    rows("curves", None, (CURVES,), "tokens_per_second or latency"),
    rows("others", None, (KERNELS, MODELS), OTHERS),
]


def retry(archive: Path, expression: str) -> list[Stage]:
    """The red tests of an archive, the sanitizer, and the rows these concern, or that `expression` keeps."""
    red = last.red(archive)
    tests = Stage("tests", 0.3, lambda *at: correctness(*at, *red.tests), summary.tests)
    timed = rows("rows", None, [KERNELS, MODELS] if expression else red.rows, expression)
    return [
        Stage("machine", 0.1, machine, summary.machine),
        *([tests] if red.tests else []),
        Stage("sanitizer", 0.3, sanitizer, summary.sanitizer),
        *([timed] if expression or red.rows else []),
    ]
