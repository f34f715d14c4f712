"""Calls in turn: whatever slows the machine down meets all of them."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Medians in seconds. wall: from the call to its result, the GPU waited for. gpu: between two events
    on its stream, gaps between launches included; None on the CPU."""

    wall: float
    gpu: float | None


def in_turn(calls: Sequence[Callable], rounds: int, warmup: int = 1) -> list[Times]:
    """All calls once, then again, `rounds` times after `warmup` that do not count."""
    found = [[one(call) for call in calls] for _ in range(warmup + rounds)][warmup:]
    medians = []
    for times in zip(*found, strict=True):
        wall, gpu = zip(*times, strict=True)
        medians.append(Times(statistics.median(wall), statistics.median(gpu) if gpu[0] else None))
    return medians


def one(call: Callable) -> tuple[float, float | None]:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return time.perf_counter() - start, begin.elapsed_time(end) / 1e3
