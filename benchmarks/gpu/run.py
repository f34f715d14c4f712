"""`make gpu`: correctness, speed, tuning and profiles on a GPU, in one run of --minutes.

    python -m benchmarks gpu --out OUT             # eight minutes
    python -m benchmarks gpu retry --last FILE     # three: what was red in that archive, and the sanitizer
    python -m benchmarks gpu rehearse              # everything on the CPU, at small sizes

Each stage ends at its limit, and the next one begins, whatever became of it. OUT/results.tgz (retry.tgz of
a retry) holds all files so far at any moment, OUT/summary.md the tables. What is red stands beside the
figures and keeps none back.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import stages
from benchmarks.gpu.archive import NAME, Archive
from benchmarks.gpu.limits import KILLED, ROOT, end_on_signals, run_limited
from benchmarks.gpu.stages import Stage
from benchmarks.gpu.summary import table
from benchmarks.harness.outcomes import NOT_RUN, PASSED, SKIPPED, entries_of

MINUTES = {"run": 8.0, "retry": 3.0, "rehearse": 20.0}
LEAST = 8.0  # seconds; with less left no stage begins
NO_GPU, PARTLY = 86, 87  # exit statuses of benchmarks/gpu/machine.py and sanitize.py
NO_GPU_HERE = "no GPU to run on; `make gpu PART=rehearse` runs without one"
RED, NOTHING = "red", "nothing ran"
LEAST_MINUTES = 3
REHEARSAL = {"EMBEDFUSE_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": ""}
STARTED = time.monotonic()


def add_arguments(parser) -> None:
    parser.add_argument(
        "part", nargs="?", choices=tuple(MINUTES), default="run", help="default: run"
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    defaults = ", ".join(f"{minutes:g} ({part})" for part, minutes in MINUTES.items())
    parser.add_argument("--minutes", type=float, help=f"of the whole; default {defaults}")
    parser.add_argument(
        "--last", type=Path, help="retry: archive of the run before; default OUT/results.tgz"
    )
    parser.add_argument(
        "--rows", default="", help="retry: pytest's -k of the rows, instead of the red ones"
    )


def run(args) -> int:
    if args.minutes is not None and args.minutes < LEAST_MINUTES:
        raise SystemExit(f"--minutes {args.minutes:g}: accepted are {LEAST_MINUTES} or more")
    if args.part != "retry" and (args.last or args.rows):
        raise SystemExit("--last, --rows: accepted with retry alone")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan, environment, archive = stages.RUN, {}, out / NAME
    if args.part == "retry":
        archive = out / "retry.tgz"  # not over the one that is read
        plan = stages.retry(args.last or out / NAME, args.rows)
    elif args.part == "rehearse":
        environment = REHEARSAL
    seconds = 60 * (args.minutes or MINUTES[args.part])
    end_on_signals()
    with tempfile.TemporaryDirectory(prefix="embedfuse-gpu-", ignore_cleanup_errors=True) as folder:
        # The compiled kernels are not results.
        work, cache = Path(folder, "work"), Path(folder, "triton")
        environment = {**environment, "TRITON_CACHE_DIR": str(cache)}
        work.mkdir()
        with Archive(work, archive):
            results = run_stages(plan, work, out, seconds, environment)
    # Of a rehearsal the tests on a GPU are skipped.
    fine = (PASSED, NOTHING) if args.part == "rehearse" else (PASSED,)
    return 0 if all(result.state in fine for result in results) else 1


@dataclass
class Result:
    """What became of a stage.

    Attributes:
        state: PASSED, RED (a test or row failed), or in words what ended it.
        limit: Seconds it had.
        took: Seconds it took.
    """

    stage: Stage
    state: str = "not begun"
    limit: float = 0.0
    took: float = 0.0


def run_stages(
    plan: list[Stage], work: Path, out: Path, seconds: float, environment: dict[str, str]
) -> list[Result]:
    """Run the stages within `seconds` in all; after each of them its table is printed and stored."""
    results = [Result(stage) for stage in plan]
    end = time.monotonic() + seconds
    for result in results:
        stage, left = result.stage, end - time.monotonic()
        result.limit = max(0.0, left if stage.share is None else min(left, stage.share * seconds))
        write_summary(results, work, out)
        if result.limit < min(LEAST, seconds / 10):
            result.state = "no time left"
            continue
        say(f"=== {stage.name}, at most {result.limit:.0f} s")
        begun = time.monotonic()
        result.state = "runs"
        write_summary(results, work, out)
        result.state = run_stage(stage, work, result.limit, environment)
        result.took = time.monotonic() - begun
        say(f"=== {stage.name}: {result.state}, {result.took:.1f} s\n{shown(stage, work)}")
        if result.state == NO_GPU_HERE:
            break
    write_summary(results, work, out)
    say(stage_table(results))
    return results


def run_stage(stage: Stage, work: Path, seconds: float, environment: dict[str, str]) -> str:
    """Run the commands of a stage; returns the state."""
    end, log = time.monotonic() + seconds, work / f"{stage.name}.txt"
    folders = str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")
    python_path = os.pathsep.join(filter(None, folders))
    settings = {"PYTHONUNBUFFERED": "1", "EMBEDFUSE_GRAPHS": "1", "PYTHONPATH": python_path}
    states = []
    for command in stage.commands(work, seconds):
        left = None
        while True:
            code = run_limited(command, log, end - time.monotonic(), {**settings, **environment})
            before, left = left, not_run(work, stage)
            # Only a process that died leaves tests to another one.
            if code in (0, 1, KILLED) or not stage.resumes or left in (0, before):
                break
            say(f"{stage.name}: ended with {code}, {left} to go")
        states.append(state_of(code))
    state = next((state for state in states if state != PASSED), PASSED)
    found = {entry["outcome"] for entry in entries_of(work / f"{stage.name}.json")}
    return NOTHING if state == PASSED and found and found <= {SKIPPED, NOT_RUN} else state


def not_run(work: Path, stage: Stage) -> int:
    entries = entries_of(work / f"{stage.name}.json") if stage.resumes else []
    return sum(entry["outcome"] == NOT_RUN for entry in entries)


def state_of(code: int) -> str:
    named = {0: PASSED, 1: RED, NO_GPU: NO_GPU_HERE, KILLED: "cut at its limit"}
    named |= {PARTLY: "partly run", 4: "names no test", 5: NOTHING}  # the last two are pytest's
    return named.get(code, f"crashed, exit status {code}")


def shown(stage: Stage, work: Path) -> str:
    """The table of a stage, or why there is none: its files may be incomplete."""
    try:
        return stage.table(work)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no table: {type(error).__name__}: {error}"


def write_summary(results: list[Result], work: Path, out: Path) -> None:
    parts = [stage_table(results)]
    parts += [f"## {r.stage.name}\n\n{shown(r.stage, work)}" for r in results if r.took]
    text = "\n\n".join(parts) + "\n"
    for folder in (work, out):
        part = folder / "summary.part"
        part.write_text(text, "utf-8")
        os.replace(part, folder / "summary.md")


def stage_table(results: list[Result]) -> str:
    cells = ((r.stage.name, r.state, f"{r.took:.1f}", f"{r.limit:.0f}") for r in results)
    return table(("stage", "state", "seconds", "limit"), cells)


def say(line: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {line}", flush=True)
