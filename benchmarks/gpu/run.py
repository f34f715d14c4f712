"""`make gpu`: correctness on the GPU, then compute-sanitizer, then speed, part by part.

    python -m benchmarks gpu --out OUT [tests|sanitizer|models|kernels|tune ...]

Default: all except tune, in that order. A part ends after --minutes (8) and lists what it left out. Results
are written as they come: after a crash a part continues with the next test, and the next part runs.
OUT/correctness.json says which ops and families passed; models and kernels skip those that failed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import record
from embedfuse import native
from embedfuse.cli import doctor

PYTEST = [sys.executable, "-m", "pytest", "-v", "--continue-on-collection-errors"]
PYTEST += ["-p", "benchmarks.harness.record", "-p", "no:cacheprovider"]
SPEED = {
    "models": ["benchmarks/models/test_curves.py", "benchmarks/gpu/test_gpu_models.py"],
    "kernels": [
        *("benchmarks/gpu/test_gpu_kernels.py", "benchmarks/kernels/test_ops.py"),
        "benchmarks/kernels/test_info_nce.py",
    ],
}
OURS = "kernel_substring=embedfuse"  # torch's kernels race by design, in sorting
# initcheck includes torch's kernels: without them, what they write would count as not written.
SANITIZER = {
    ("memcheck", "cuda"): [],
    ("racecheck", "cuda"): ["--kernel-name", OURS],
    ("initcheck", "cuda"): [],
    ("memcheck", "triton"): [],
}
GRACE = 30  # seconds after the budget in which the running test may end
STARTED = time.monotonic()


def add_arguments(parser) -> None:
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all except tune")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of each part")


def run(args) -> int:
    if unknown := sorted(set(args.parts) - PARTS.keys()):
        raise SystemExit(f"parts: {', '.join(unknown)}; accepted are {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if reason := describe(args.out):
        say(f"no GPU to run on: {reason}. `make bench` makes the same report for the CPU.")
        return 2
    failed = [
        name
        for name in args.parts or [name for name in PARTS if name != "tune"]
        if not run_part(name, args.out, 60 * args.minutes)
    ]
    say(f"failed: {', '.join(failed)}" if failed else "all parts passed")
    return 1 if failed else 0


def describe(out: Path) -> str | None:
    """Print what this machine has; returns the reason where nothing can run."""
    facts = doctor.collect()
    (out / "doctor.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(doctor.as_text(facts), flush=True)
    try:
        native.require_gpu()
    except native.Unavailable as reason:
        return str(reason)
    gpu = torch.cuda.get_device_properties(0)
    asked = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.sm,power.limit",
        "--format=csv,noheader",
    ]
    driver = "nvidia-smi is absent"
    if shutil.which(asked[0]):
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    say(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"driver, clock, power limit: {driver}")  # fmt: skip
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:
        return f"{gpu.name} runs no kernel of torch {torch.__version__}: {error}"
    return None


def run_part(name: str, out: Path, budget: float) -> bool:
    say(f"=== {name}, at most {budget / 60:.3g} minutes")
    end = time.monotonic() + budget
    try:
        fine = PARTS[name](name, out, end)
    except Exception as error:
        say(f"{name}: {type(error).__name__}: {error}")
        fine = False
    say(f"=== {name}: {'passed' if fine else 'FAILED'}")
    return fine


def run_tests(name: str, out: Path, end: float) -> bool:
    entries = run_pytest(["-m", "gpu", "tests"], out, name, end)
    verdicts = record.verdicts(entries)
    (out / "correctness.json").write_text(json.dumps(verdicts, indent=1) + "\n")
    for subject, verdict in verdicts.items():
        say(f"{verdict:8} {subject}")
    return not record.failed_names(verdicts) and record.PASSED in verdicts.values()


def run_speed(name: str, out: Path, end: float) -> bool:
    gate = out / "correctness.json"
    if not gate.exists():
        say(f"{name}: no {gate}, so nothing is skipped; each benchmark checks the values itself")
    files = ["--benchmark-only", "--correctness", str(gate), *SPEED[name]]
    entries = run_pytest(files, out, name, end)
    stored = [str(path) for part in SPEED if (path := out / f"{part}.json").exists()]
    report = [sys.executable, "-m", "benchmarks", "report", *stored, "--out", str(out)]
    reported = run_logged(report, out / f"{name}-report.txt", time.monotonic() + 120) == 0
    # Failures of other libraries are reported, and are no failure of this part.
    ours = {e["outcome"] for e in entries if "other_libraries" not in e["name"]}
    return reported and not ours & {record.FAILED, record.BEGUN}


def run_pytest(arguments: list[str], out: Path, name: str, end: float) -> list[dict]:
    """The entries of the results file. After a crash a new process continues, as long as it gets further."""
    results = out / f"{name}.json"
    results.unlink(missing_ok=True)
    left = None
    while time.monotonic() < end:
        budget = ["--results", str(results), "--budget", f"{end - time.monotonic():.0f}"]
        code = run_logged([*PYTEST, *budget, *arguments], out / f"{name}.txt", end + GRACE)
        entries = json.loads(results.read_text())["benchmarks"] if results.exists() else []
        before, left = left, sum(e["outcome"] == record.NOT_RUN for e in entries)
        if code == 0 or left in (0, before) or not entries:
            break
        say(f"{name}: pytest ended with {code}, {left} tests to go")
    if not results.exists():
        raise RuntimeError(f"pytest ended with {code} before it collected a test")
    say_outcomes(name, entries)
    return entries


def say_outcomes(name: str, entries: list[dict]) -> None:
    counts = Counter(entry["outcome"] for entry in entries)
    say(f"{name}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}")
    for entry in entries:
        if entry["outcome"] == record.BEGUN:
            say(f"  did not end (a crash, or the time was over): {entry['name']}")
        elif entry["outcome"] != record.PASSED:
            say(f"  {entry['outcome']}: {entry['name']} {entry.get('reason', '')}".rstrip())


def run_sanitizer(name: str, out: Path, end: float) -> bool:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        say(
            "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin: nothing was checked"
        )
        return True
    # Each tensor gets its memory from cudaMalloc, so that the tools see where it ends.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    verdicts = {}
    for (check, backend), options in SANITIZER.items():
        if time.monotonic() > end:
            verdicts[f"{check} {backend}"] = record.NOT_RUN
            continue
        # torch makes driver calls that may fail by design, so API errors are not reported.
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            "--report-api-errors",
            "no",
            *options,
        ]
        command += [sys.executable, "-m", "benchmarks.gpu.sanitize", backend]
        log = out / f"sanitizer-{check}-{backend}.txt"
        code = run_logged(command, log, end + GRACE, environment)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log.read_text())
        verdict = record.PASSED if code == 0 and summary else record.FAILED
        verdicts[f"{check} {backend}"] = (
            f"{verdict}: {summary[-1] if summary else f'ended with {code}'}"
        )
        (out / "sanitizer.json").write_text(json.dumps(verdicts, indent=1) + "\n")
    for what, verdict in verdicts.items():
        say(f"{what}: {verdict}")
    return not any(verdict.startswith(record.FAILED) for verdict in verdicts.values())


def run_tune(name: str, out: Path, end: float) -> bool:
    budget = f"{max(0.0, end - time.monotonic()):.0f}"
    command = [sys.executable, "-m", "benchmarks", "tune", "--budget", budget]
    command += ["--out", str(out / "configs")]  # on a borrowed machine only `out` is kept
    return run_logged(command, out / "tune.txt", end + GRACE) == 0


def run_logged(command: list[str], log: Path, end: float, environment: dict | None = None) -> int:
    """Exit status of the command, which is killed at `end`; its output is shown and appended to `log`."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", "EMBEDFUSE_GRAPHS": "1", **(environment or {})},
        start_new_session=True,
    )
    left = max(0.0, end - time.monotonic())
    killer = threading.Timer(left, os.killpg, (process.pid, signal.SIGKILL))  # its children too
    killer.start()
    with log.open("a") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            say(line.rstrip())
    killer.cancel()
    return process.wait()


def say(line: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {line}", flush=True)


PARTS: dict[str, Callable[[str, Path, float], bool]] = {
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "models": run_speed,
    "kernels": run_speed,
    "tune": run_tune,
}
