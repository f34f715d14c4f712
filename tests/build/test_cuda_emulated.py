"""The CUDA kernels without a GPU: compiled by c++ on cuda_emulated.h, beside their ops' references."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedfuse import testing
from embedfuse.ops.pool_normalize import POOLINGS
from tests import pool_normalize_checks
from tests.build import emulated_cuda

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Sanitizer -> flags of the compiler, library that the process begins with.
SANITIZERS = {
    "address": ("address,undefined", "libasan.so"),
    "thread": ("thread", "libtsan.so"),  # races between the threads of a block
}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("op", emulated_cuda.OPS, ids=lambda op: op.name)
def test_samples(emulated, op, dtype):
    emulated_cuda.check_samples(op, dtype)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pool_normalize_nan(emulated, pooling):
    pool_normalize_checks.check_nan("cuda", "cpu", torch.bfloat16, pooling)


@pytest.fixture(params=SANITIZERS)
def run_sanitized(request, tmp_path):
    """A function that runs every n-th sample under a sanitizer, which ends the process at a fault."""
    flags, library = SANITIZERS[request.param]
    found = subprocess.check_output(["c++", f"-print-file-name={library}"], text=True).strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler comes without {library}")
    flags = f"-fsanitize={flags}", "-fno-sanitize-recover=all", "-fsanitize-sections=cuda_shared"
    module = emulated_cuda.build(tmp_path, *flags)
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    options |= {
        "LD_PRELOAD": found,
        "OMP_NUM_THREADS": "1",
    }  # torch's own threads are not its subject

    def run(step: int):
        done = subprocess.run(
            [sys.executable, "-m", "tests.build.emulated_cuda", str(module), str(step)],
            cwd=ROOT,
            env={**os.environ, **options},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-8000:]

    return run


def test_some_samples_under_a_sanitizer(run_sanitized):
    run_sanitized(23)


@pytest.mark.slow
def test_all_samples_under_a_sanitizer(run_sanitized):
    run_sanitized(1)


KERNELS = """
#include "cuda_emulated.h"
__global__ void half_a_warp(int*) { if (threadIdx.x < 16) __ballot_sync(~0u, true); }
__global__ void some_lanes(int*) { __shfl_xor_sync(0xffff, 1, 1); }
__global__ void barrier_and_ballot(int*) {
  if (threadIdx.x < 16) __syncthreads(); else __ballot_sync(~0u, true);
}
__global__ void trap(int*) { __trap(); }
// A barrier counts threads that left, each block begins with garbage, warps exchange values.
__global__ void values(int* out) {
  __shared__ float fixed[2];
  extern __shared__ float sized[];
  const bool nan = fixed[1] != fixed[1] && sized[1] != sized[1];
  if (threadIdx.x >= 32) return;
  const int sum = int(threadIdx.x) + __shfl_xor_sync(~0u, int(threadIdx.x), 1);
  const unsigned odd = __ballot_sync(~0u, threadIdx.x % 2);
  __syncthreads();
  fixed[1] = sized[1] = 0;
  atomicMax(out, int(blockIdx.x * 2 + (odd == 0xaaaaaaaa) + nan * 10));
  atomicMax(out + 1, sum);
  if (atomicCAS(out + 2, 0, 5) == 5) atomicCAS(out + 2, 5, 7);
}
"""
MAIN = """
int main() {{
  int out[3] = {{}};
  {body}
  std::printf("%d %d %d %s", out[0], out[1], out[2], cudaGetErrorString(cudaGetLastError()));
}}
"""


@pytest.fixture
def run_kernel(tmp_path):
    """A program with the given launch: exit status, output, what it said of errors."""

    def run(body):
        source, program = tmp_path / "kernel.cpp", tmp_path / "kernel"
        source.write_text(emulated_cuda.on_the_host(KERNELS + MAIN.format(body=body)))
        flags = ["-std=c++20", f"-I{HERE}", f"-I{ROOT / 'csrc/include'}"]
        subprocess.run(["c++", *flags, source, "-o", program], check=True)
        done = subprocess.run([program], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize(
    ("kernel", "threads", "text"),
    [
        ("half_a_warp", 32, "left while its warp exchanges|threads that have left"),
        ("some_lanes", 32, "less than a warp"),
        ("some_lanes", 16, "less than a warp"),
        ("barrier_and_ballot", 32, "__syncthreads"),
        ("trap", 1, "__trap"),
    ],
)
def test_misuse_ends_the_emulation(run_kernel, kernel, threads, text):
    status, _, error = run_kernel(f"{kernel}<<<1, {threads}, 0, 0>>>(out);")
    assert status < 0
    assert re.fullmatch(f"emulated CUDA: .*({text}).*\n", error)


@pytest.mark.parametrize(
    ("launch", "fails"),
    [
        ("<<<1, 1024, 48 * 1024, 0>>>", False),
        ("<<<0, 64, 8, 0>>>", True),
        ("<<<1ll << 31, 64, 8, 0>>>", True),
        ("<<<1, 1025, 8, 0>>>", True),
        ("<<<1, 64, 48 * 1024 + 4, 0>>>", True),
    ],
)
def test_launches_are_held_to_the_limits(run_kernel, launch, fails):
    status, output, _ = run_kernel(f"values{launch}(out);")
    assert status == 0
    assert output == ("0 0 0 invalid configuration argument" if fails else "11 61 7 no error")


def test_what_leave_is_asked_for_may_be_as_large_as_a_gpu_has_it(run_kernel):
    attribute = "cudaFuncAttributeMaxDynamicSharedMemorySize"
    for bytes_, said in ((227 * 1024, "15 61 7 no error"), (228 * 1024, "0 0 0 invalid argument")):
        allowed = f"cudaFuncSetAttribute(values, {attribute}, {bytes_})"
        body = f"if (({allowed}) == cudaSuccess) values<<<3, 64, {bytes_}, 0>>>(out);"
        body += "else emulated::last_error = cudaErrorInvalidValue;"
        assert run_kernel(body)[:2] == (0, said)
