"""What this machine reaches at most: memory bandwidth, and the rate of a large GEMM per dtype."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Peaks:
    """bandwidth: bytes/s, of reading on the CPU, of reading and writing on a GPU. flops: FLOP/s."""

    bandwidth: float
    flops: dict[torch.dtype, float]

    def floor(self, cost, dtype: torch.dtype) -> float:
        """Seconds that a call of such a registry.Cost takes at least."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.flops[dtype])


def measure(device: str) -> Peaks:
    return Peaks(bandwidth(device), {dtype: gemm_rate(device, dtype) for dtype in DTYPES})


def bandwidth(device: str) -> float:
    if device == "cpu":
        x = torch.ones(2**26)  # 256 MiB
        return x.nbytes / min(cpu_seconds(x.sum))
    x = torch.ones(2**28, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(cuda_seconds(lambda: y.copy_(x)))


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)  # fresh pages would cost more than the arithmetic
    seconds = cpu_seconds if device == "cpu" else cuda_seconds
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, b, out=out)))


def cpu_seconds(call: Callable) -> list[float]:
    """Times of calls during two seconds: the best of fewer moves by half where others share the memory."""
    call()
    times = []
    while sum(times) < 2:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def cuda_seconds(call: Callable, repeats: int = 20, before: Callable = lambda: None) -> list[float]:
    """Time on the GPU of each call, by events; `before` is queued ahead of each and not counted."""
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(2 * 10**7)  # some 10 ms, in which launches get ahead of the GPU
    for start, end in events:
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
