"""compute-sanitizer over every kernel of our own, on the test samples of its op.

    python -m benchmarks.gpu.sanitize FOLDER SECONDS    # all checks; writes sanitizer.json and a log of each
    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize launch cuda    # one by hand

`launch` prints the name of the op before its kernels run, so that reports of the tool can be assigned to it.
Results are not compared here; tests/gpu compares them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.run import PARTLY
from benchmarks.harness.outcomes import FAILED, NOT_RUN, PASSED
from benchmarks.harness.rehearsal import REHEARSAL, size

OURS = "kernel_substring=embedfuse"  # torch's kernels race by design, in sorting
# What finds most comes first. initcheck includes torch's kernels: without them, what they write would count
# as not written.
CHECKS = {
    ("racecheck", "cuda"): ["--kernel-name", OURS],
    ("memcheck", "cuda"): [],
    ("memcheck", "triton"): [],
    ("initcheck", "cuda"): [],
}


def main() -> int:
    if sys.argv[1] == "launch":
        launch(sys.argv[2])
        return 0
    folder, end = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    verdicts = {f"{check} {backend}": NOT_RUN for check, backend in CHECKS}
    for (check, backend), options in CHECKS.items():
        log = folder / f"sanitizer-{check}-{backend}.log"
        verdicts[f"{check} {backend}"] = run_check(check, backend, options, log, end)
        (folder / "sanitizer.json").write_text(json.dumps(verdicts, indent=1) + "\n")
    found = {verdict.split(":")[0] for verdict in verdicts.values()}
    return 1 if FAILED in found else PARTLY if NOT_RUN in found else 0


def run_check(check: str, backend: str, options: list[str], log: Path, end: float) -> str:
    """The verdict of one check; what did not end in time was not run."""
    tool = find_tool()
    if tool is None and not REHEARSAL:
        return f"{NOT_RUN}: compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin"
    command = [sys.executable, "-m", "benchmarks.gpu.sanitize", "launch", backend]
    if tool is not None:
        # torch makes driver calls that may fail by design, so API errors are not reported.
        wrapper = [tool, "--tool", check, "--error-exitcode", "9", "--report-api-errors", "no"]
        command = [*wrapper, *options, *command]
    # Each tensor gets its memory from cudaMalloc, so that the tools see where it ends.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("w") as output:
        try:
            left = max(0.0, end - time.monotonic())
            code = subprocess.run(
                command, stdout=output, stderr=output, env=environment, timeout=left
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{NOT_RUN}: cut after {left:.0f} s"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log.read_text())
    if tool is None:
        summary = ["launched without the tool"]
    verdict = PASSED if code == 0 and summary else FAILED
    return f"{verdict}: {summary[-1] if summary else f'ended with {code}'}"


def find_tool() -> str | None:
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def launch(backend: str) -> None:
    if REHEARSAL:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from benchmarks.harness.timing import DEVICE
    from embedfuse import testing
    from embedfuse.registry import OPS, use_backend

    for op in OPS.values():
        if backend not in testing.backends(op, DEVICE):
            continue
        if reason := op.refusal(backend, DEVICE, torch.float32):
            raise SystemExit(f"{op.name}: {reason}")
        for dtype in testing.DTYPES:
            print(f"{op.name} {dtype}", flush=True)
            with use_backend(backend):
                for args in op.make_samples(DEVICE, dtype, "test")[: size(None, 1)]:
                    testing.run(op, args)
            if DEVICE == "cuda":
                torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
