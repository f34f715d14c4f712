"""How calls are timed: interleaved, so that whatever slows the machine down slows all of them."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness.rehearsal import size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Times:
    """Median seconds of a call.

    Attributes:
        wall: From the call to its result, after the GPU has finished.
        gpu: Between two CUDA events. None on the CPU.
    """

    wall: float
    gpu: float | None

    @property
    def on_device(self) -> float:
        """`gpu`, or on the CPU `wall`."""
        return self.wall if self.gpu is None else self.gpu


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
    """Seconds by the wall clock and by CUDA events.

    A short call runs a second time for its events, queued while the GPU is kept busy: otherwise it would idle
    between launches, and the events would measure Python.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, None
    wall, gpu = between_events(call)
    if wall < SHORT:
        _, gpu = between_events(call, asleep=2 * wall)
    return wall, gpu


# Seconds. The launches of longer calls run ahead of the GPU.
SHORT = 0.02
# Cycles per second of torch.cuda._sleep: no GPU's clock is faster, so that it sleeps no shorter.
CLOCK = 3e9
LONGEST_SLEEP = 0.5


def between_events(call: Callable, asleep: float = 0.0) -> tuple[float, float]:
    """Seconds of a call by the wall clock and between events, the GPU first asleep for so many seconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    sleep(asleep)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return time.perf_counter() - start, begin.elapsed_time(end) / 1e3


def sleep(seconds: float) -> None:
    """Queue this much idling of the GPU, so that what is queued next finds no gap."""
    if seconds:
        torch.cuda._sleep(int(CLOCK * min(seconds, LONGEST_SLEEP)))


def cpu_seconds(call: Callable) -> list[float]:
    """Times of repeated calls during two seconds.

    The best of fewer calls varies by half where other processes use the memory.
    """
    call()
    times = []
    while sum(times) < size(2, 0.1):
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
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = (
        time.perf_counter() - start
    )  # a call that waits for the GPU counts that wait: it sleeps longer
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    # Until all launches are queued.
    sleep(0.01 + 1.5 * repeats * host)
    for begin, end in events:
        before()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def seconds(call: Callable, repeats: int = 20, before: Callable = lambda: None) -> list[float]:
    """Time of each call on DEVICE."""
    if DEVICE == "cuda":
        return cuda_seconds(call, repeats, before)
    call()
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
