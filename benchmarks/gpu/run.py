"""`make gpu`: correctness on the GPU, then compute-sanitizer, then speed, part by part.

    python -m benchmarks.gpu.run --out OUT [tests|sanitizer|models|kernels|tune ...]

Default: all but tune, in that order. A part ends after --minutes (8); what it left out is named. Results are
written as they come: a part that crashes goes on behind the test that crashed it, and the next part runs.
OUT/correctness.json says which ops and families are right; models and kernels leave out what is red there.
"""

import argparse
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

from benchmarks.harness import ledger
from embedfuse import native
from embedfuse.cli import doctor

PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-p",
    "benchmarks.harness.ledger",
    "-p",
    "no:cacheprovider",
    "-v",
]
PYTEST += ["--continue-on-collection-errors"]
SPEED = {
    "models": ["benchmarks/models/test_curves.py", "benchmarks/gpu/test_gpu_models.py"],
    "kernels": [
        *("benchmarks/gpu/test_gpu_kernels.py", "benchmarks/kernels/test_ops.py"),
        "benchmarks/kernels/test_info_nce.py",
    ],
}
OURS = "kernel_substring=embedfuse"  # torch's kernels race by design, in sorting
# initcheck watches all: what a kernel that is not watched has written would count as unwritten.
SANITIZER = {
    ("memcheck", "cuda"): [],
    ("racecheck", "cuda"): ["--kernel-name", OURS],
    ("initcheck", "cuda"): [],
    ("memcheck", "triton"): [],
}
GRACE = 30  # seconds that the test that is running gets beyond the budget
STARTED = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.run", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all but tune")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of each part")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"parts: {', '.join(sorted(unknown))}; accepted are {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if reason := describe(args.out):
        say(f"no GPU to run on: {reason}. `make bench` makes the same report for the CPU.")
        return 2
    failed = [
        name
        for name in args.parts or [name for name in PARTS if name != "tune"]
        if not run_part(name, args.out, 60 * args.minutes)
    ]
    say(f"failed: {', '.join(failed)}" if failed else "all parts are through")
    return 1 if failed else 0


def describe(out: Path) -> str | None:
    """Print what is here; the reason where nothing can run."""
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
    found = ledger.verdicts(entries)
    (out / "correctness.json").write_text(json.dumps(found, indent=1) + "\n")
    for subject, verdict in found.items():
        say(f"{verdict:8} {subject}")
    return not ledger.red(found) and ledger.PASSED in found.values()


def run_speed(name: str, out: Path, end: float) -> bool:
    gate = out / "correctness.json"
    if not gate.exists():
        say(f"{name}: no {gate}, so nothing is left out; each benchmark checks its own results")
    files = ["--benchmark-only", "--correctness", str(gate), *SPEED[name]]
    entries = run_pytest(files, out, name, end)
    stored = [str(path) for part in SPEED if (path := out / f"{part}.json").exists()]
    report = [sys.executable, "-m", "embedfuse", "bench", "report", *stored, "--out", str(out)]
    reported = run(report, out / f"{name}-report.txt", time.monotonic() + 120) == 0
    # What others break off is told, and is no fault of ours.
    own = {e["outcome"] for e in entries if "beside_others" not in e["name"]}
    return reported and not own & {ledger.FAILED, ledger.BEGUN}


def run_pytest(arguments: list[str], out: Path, name: str, end: float) -> list[dict]:
    """The ledger's entries. A run that crashed goes on behind its crash for as long as that gets further."""
    results = out / f"{name}.json"
    results.unlink(missing_ok=True)
    left = None
    while time.monotonic() < end:
        budget = ["--results", str(results), "--budget", f"{end - time.monotonic():.0f}"]
        code = run([*PYTEST, *budget, *arguments], out / f"{name}.txt", end + GRACE)
        entries = json.loads(results.read_text())["benchmarks"] if results.exists() else []
        before, left = left, sum(e["outcome"] == ledger.NOT_RUN for e in entries)
        if code == 0 or left in (0, before) or not entries:
            break
        say(f"{name}: pytest ended with {code}, {left} tests to go")
    if not results.exists():
        raise RuntimeError(f"pytest ended with {code} before it collected a test")
    tell(name, entries)
    return entries


def tell(name: str, entries: list[dict]) -> None:
    say(
        f"{name}: "
        + ", ".join(f"{n} {what}" for what, n in Counter(e["outcome"] for e in entries).items())
    )
    for entry in entries:
        if entry["outcome"] == ledger.BEGUN:
            say(f"  did not end (a crash, or the time was up): {entry['name']}")
        elif entry["outcome"] != ledger.PASSED:
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
    # Memory from cudaMalloc, each tensor for itself, so that the tools see where it ends.
    paths = os.pathsep.join(filter(None, ["tests", os.environ.get("PYTHONPATH")]))
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths}
    found = {}
    for (check, backend), options in SANITIZER.items():
        if time.monotonic() > end:
            found[f"{check} {backend}"] = ledger.NOT_RUN
            continue
        # torch asks the driver for what may not be there; that is no error of ours.
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
        code = run(command, log, end + GRACE, environment)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log.read_text())
        verdict = ledger.PASSED if code == 0 and summary else ledger.FAILED
        found[f"{check} {backend}"] = (
            f"{verdict}: {summary[-1] if summary else f'ended with {code}'}"
        )
        (out / "sanitizer.json").write_text(json.dumps(found, indent=1) + "\n")
    for what, verdict in found.items():
        say(f"{what}: {verdict}")
    return not any(verdict.startswith(ledger.FAILED) for verdict in found.values())


def run_tune(name: str, out: Path, end: float) -> bool:
    budget = f"{max(0.0, end - time.monotonic()):.0f}"
    command = [sys.executable, "-m", "embedfuse", "bench", "tune", "--budget", budget]
    command += ["--out", str(out / "configs")]  # on a lent machine only `out` outlives the run
    return run(command, out / "tune.txt", end + GRACE) == 0


def run(command: list[str], log: Path, end: float, environment: dict | None = None) -> int:
    """The exit status; killed at `end`. What it prints is shown with the time, and appended to `log`."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
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

if __name__ == "__main__":
    raise SystemExit(main())
