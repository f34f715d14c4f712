import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.kernels.occupancy import CHIPS, resident_blocks

# NVIDIA's arithmetic with the same limits.
PEER = r"""
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int major, minor, per_sm, per_block, registers, shared, warps;
  while (scanf("%d %d %d %d", &major, &minor, &per_sm, &per_block) == 4) {
    if (scanf("%d %d %d", &registers, &shared, &warps) != 3) return 1;
    cudaOccDeviceProp p;
    p.computeMajor = major, p.computeMinor = minor, p.warpSize = 32;
    p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = 2048;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.numSms = 1;
    p.sharedMemPerBlock = 48 * 1024, p.sharedMemPerMultiprocessor = per_sm;
    p.sharedMemPerBlockOptin = per_block, p.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes f;
    f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.sharedSizeBytes = 0;
    f.partitionedGCConfig = PARTITIONED_GC_OFF, f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    f.maxDynamicSharedSizeBytes = per_block, f.numBlockBarriers = 1;
    cudaOccDeviceState s;
    s.cacheConfig = CACHE_PREFER_SHARED, s.carveoutConfig = 100;
    cudaOccResult r;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, warps * 32, shared) != 0) return 1;
    printf("%d\n", r.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "warps", "blocks"),
    [
        # 128 registers: 4,096 per warp, 4 warps in each quarter of 16,384; 16 warps are 4 blocks of 4.
        ("sm_90", 128, 0, 4, 4),
        # 129 round up to 136, 4,352 per warp: 3 warps in each quarter, 12 in all, 3 blocks.
        ("sm_90", 129, 0, 4, 3),
        # 255 round up to 256: 8 warps.
        ("sm_80", 255, 0, 8, 1),
        # 16 warps of 136 registers are more than there are.
        ("sm_90", 129, 0, 16, 0),
        # 64 warps at most: 16 blocks of 4. 32 blocks at most, of one warp each.
        ("sm_90", 16, 0, 4, 16),
        ("sm_90", 16, 0, 1, 32),
        # 72 KiB and 1 KiB reserved by the system: 3 x 73 of 228, 2 x 73 of 164.
        ("sm_90", 32, 72 * 1024, 4, 3),
        ("sm_80", 32, 72 * 1024, 4, 2),
        ("sm_90", 32, 227 * 1024, 4, 1),
        ("sm_90", 32, 227 * 1024 + 1, 4, 0),
        ("sm_80", 32, 163 * 1024 + 1, 4, 0),
    ],
)
def test_resident_blocks_by_hand(chip, registers, shared, warps, blocks):
    assert resident_blocks(CHIPS[chip], registers, shared, warps) == blocks


def test_resident_blocks_as_cuda_occupancy_h(tmp_path):
    triton = pytest.importorskip("triton")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    compiler = shutil.which("c++")
    if compiler is None or not (include / "cuda_occupancy.h").exists():
        pytest.skip("needs a C++ compiler and Triton's copy of cuda_occupancy.h")
    source, program = tmp_path / "peer.cpp", tmp_path / "peer"
    source.write_text(PEER)
    subprocess.run([compiler, "-w", f"-I{include}", source, "-o", program], check=True)
    sizes = (0, 1, 1000, 9000, 33000, 49 * 1024, 72 * 1024 + 5, 113 * 1024, 160 * 1024, 227 * 1024)
    calls = [
        (name, *call)
        for name, chip in CHIPS.items()
        for call in itertools.product(
            (16, 33, 64, 72, 96, 128, 129, 168, 255), sizes, (1, 2, 4, 8, 16)
        )
        if call[1] <= chip.block_shared
    ]
    lines = [
        f"{name[3:-1]} {name[-1]} {CHIPS[name].shared} {CHIPS[name].block_shared} {r} {s} {w}"
        for name, r, s, w in calls
    ]
    command = [program]
    printed = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout
    expected = list(map(int, printed.split()))
    assert len(expected) == len(calls)
    got = [resident_blocks(CHIPS[name], *call) for name, *call in calls]
    different = [(c, g, e) for c, g, e in zip(calls, got, expected, strict=True) if g != e]
    assert not different
