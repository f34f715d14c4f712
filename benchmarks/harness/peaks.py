"""The most that this machine reaches: memory bandwidth, and the rate of a large GEMM per dtype."""

from dataclasses import dataclass

import torch

from benchmarks.harness.rehearsal import size
from benchmarks.harness.timing import cpu_seconds, cuda_seconds

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Peaks:
    """Measured limits.

    Attributes:
        bandwidth: Bytes per second: of reading on the CPU, of reading and writing on a GPU.
        flops: FLOP per second of a GEMM, by dtype.
    """

    bandwidth: float
    flops: dict[torch.dtype, float]

    def floor(self, cost, dtype: torch.dtype) -> float:
        """The fewest seconds that a call of this registry.Cost can take."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.flops[dtype])


def measure(device: str) -> Peaks:
    return Peaks(bandwidth(device), {dtype: gemm_rate(device, dtype) for dtype in DTYPES})


def bandwidth(device: str) -> float:
    if device == "cpu":
        x = torch.ones(size(2**26, 2**20))  # 256 MiB
        return x.nbytes / min(cpu_seconds(x.sum))
    x = torch.ones(2**28, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(cuda_seconds(lambda: y.copy_(x)))


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    n = size(2048, 128) if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)  # fresh pages would cost more than the arithmetic
    seconds = cpu_seconds if device == "cpu" else cuda_seconds
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, b, out=out)))
