"""The Triton kernels without a GPU: Triton's interpreter, which must be chosen before triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [f"tests/interpret/cases_{name}.py" for name in ("triton", "maxsim", "ranges")]


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    # The hand-worked cases of each op, which otherwise run on the CPU's backends.
    names = [kernel.name for kernel in sorted((ROOT / "triton_kernels").glob("[!_]*.py"))]
    by_hand = [f"tests/ops/test_{name}" for name in names]
    by_hand = [path for path in by_hand if (ROOT / path).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "interpret.triton_only"]
    # Where cu_seqlens lies on a GPU its values are not checked, and no kernel here has threads.
    command += ["-k", "not errors and not threads", *CASES, *by_hand]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout), result.stdout
