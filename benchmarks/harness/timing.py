"""How calls are timed: interleaved, so that whatever slows the machine down slows all of them."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Times:
    """Median seconds of a call.

    Attributes:
        wall: From the call to its result, after the GPU has finished.
        gpu: Between two CUDA events, gaps between launches included. None on the CPU.
    """

    wall: float
    gpu: float | None


def interleaved(calls: Sequence[Callable], rounds: int, warmup: int = 1) -> list[Times]:
    """Times of each call: all of them once, then all again, `rounds` times after `warmup` rounds."""
    measured = [[time_once(call) for call in calls] for _ in range(warmup + rounds)][warmup:]
    medians = []
    for times in zip(*measured, strict=True):
        wall, gpu = zip(*times, strict=True)
        medians.append(Times(statistics.median(wall), statistics.median(gpu) if gpu[0] else None))
    return medians


# libgomp's threads spin for 3 ms or more after their work, and take a core from whoever is called then.
SETTLE = 0.02


def in_turns(
    calls: Sequence[Callable], inputs: Sequence, turns: int, limit: float = math.inf
) -> list[list[float]]:
    """Seconds of each call on the CPU: the first on all inputs, then the next on all, and so on.

    Before its turn a call has a pause and one run that does not count, as if it were alone on the machine.

    Args:
        calls: Each takes one of `inputs`.
        inputs: What they take.
        turns: Of each call.
        limit: Seconds after which no round of turns begins.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    begun = time.monotonic()
    for done in range(turns):
        if done and time.monotonic() - begun > limit:
            break
        for call, times in zip(calls, seconds, strict=True):
            time.sleep(SETTLE)
            call(inputs[-1])
            for x in inputs:
                start = time.perf_counter()
                call(x)
                times.append(time.perf_counter() - start)
    return seconds


def time_once(call: Callable) -> tuple[float, float | None]:
    """Seconds by the wall clock and by CUDA events."""
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


def cpu_seconds(call: Callable) -> list[float]:
    """Times of repeated calls during two seconds.

    The best of fewer calls varies by half where other processes use the memory.
    """
    call()
    times = []
    while sum(times) < 2:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def cuda_seconds(call: Callable, repeats: int = 20, before: Callable = lambda: None) -> list[float]:
    """Time of each call on the GPU, between CUDA events.

    Args:
        call: What is timed.
        repeats: Number of calls.
        before: Queued ahead of each call and not timed, e.g. to empty the caches.
    """
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    # About 10 ms, so that launches are queued before the GPU needs them.
    torch.cuda._sleep(2 * 10**7)
    for start, end in events:
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
