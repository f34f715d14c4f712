"""What is compiled ahead, without a GPU, is what larger calls look up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from pathlib import Path
import torch
from embedfuse.triton_kernels import info_nce_fused, tuned
from benchmarks.gpu import precompile
from benchmarks.gpu.calls import OpCall
from benchmarks.kernels.stubbed import compiling
from embedfuse.registry import OPS

def kernels():
    return {p.parent.name for p in Path(sys.argv[1]).rglob("*.cubin")}

small = {"B_Q": 64, "B_N": 64, "B_D": 64, "num_warps": 4, "num_stages": 2}
listed = precompile.tasks()
name = info_nce_fused.GRADIENT.name
index = next(index for index, kernel, _ in listed if kernel == name)
print("tasks", len(listed), len({(index, kernel) for index, kernel, _ in listed[:10]}))
print("outcome", precompile.compile_one((index, name, small)))
before = kernels()
print("kernels", len(before))
print("types", sorted({"bf16" in p.read_text() for p in Path(sys.argv[1]).rglob("*.ttir")}))
with compiling(), tuned.choosing(lambda *_, **__: small):
    calls = info_nce_fused.op_calls("cpu", torch.bfloat16, ((96, 1024, 128),))
    next(calls)
    op, args = next(calls)  # the backward
    OPS[op](*args)
print("more", len(kernels() - before))
print("bad", precompile.compile_one((index, name, {**small, "num_warps": 3})))
"""


def test_larger_calls_find_what_small_ones_compiled(tmp_path):
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    # Each call and kernel takes its turn.
    assert found["tasks"].split()[1] == "10"
    assert found["outcome"] == "compiled"
    assert found["kernels"] == "1"
    assert found["types"] == "[True]"
    assert found["more"] == "0"
    assert found["bad"] != "compiled"
