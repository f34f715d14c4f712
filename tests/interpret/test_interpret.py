"""The Triton kernels without a GPU: Triton's interpreter, which must be chosen before triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The hand-worked cases of each op, which otherwise run on the CPU's backends.
KERNELS = [kernel.stem for kernel in sorted((ROOT / "triton_kernels").glob("[!_]*.py"))]
BY_HAND = [path for name in KERNELS if (path := ROOT / f"tests/ops/test_{name}.py").exists()]
MAXSIM = [path for path in BY_HAND if path.stem == "test_maxsim"]
FILES = {
    "samples": ["cases_triton.py"],
    "programs": ["cases_programs.py"],
    "maxsim": ["cases_maxsim.py", *MAXSIM],
    "by hand": ["cases_ranges.py", *(path for path in BY_HAND if path not in MAXSIM)],
}


@pytest.mark.parametrize("part", FILES)
def test_triton_kernels_in_the_interpreter(part):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.interpret.triton_only"]
    # Where cu_seqlens lies on a GPU its values are not checked, and no kernel here has threads.
    command += ["-k", "not errors and not threads"]
    command += [Path(__file__).parent / file for file in FILES[part]]
    paths = filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")))
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout), result.stdout
