"""The candidates of the headline kernels, compiled into Triton's cache by all processors, without a GPU.

Each process makes small calls with launches stubbed (benchmarks/kernels/stubbed.py), so Triton compiles, and
files, what the large calls will look up on the GPU.
"""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

import torch

from benchmarks.gpu import search
from benchmarks.gpu.calls import HEADLINE, OpCall, headline_calls
from benchmarks.kernels.machine_code import LaunchRecorder, kernel_modules, replaced
from benchmarks.kernels.stubbed import compiling
from embedfuse.triton_kernels import tuned

Task = tuple[int, str, dict]  # number of the call, name of the tunable, its config


def precompile(seconds: float, most: int | None = None) -> str:
    """Compile what is possible in that time, `most` configs of it; returns what became of them."""
    end, processes = time.monotonic() + seconds, max(1, (os.cpu_count() or 1) - 1)
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            listed = pool.submit(tasks).result()[:most]
            futures = [pool.submit(compile_one, task) for task in listed]
            done, left = wait(futures, max(0.0, end - time.monotonic()))
            pool.shutdown(wait=False, cancel_futures=True)
        counts = collections.Counter(map(outcome, done))
    described = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{described}, {len(left)} left, by {processes} processes in {seconds:.0f} s at most"


def outcome(future: Future) -> str:
    try:
        return future.result()
    except BrokenProcessPool:  # a compiler died; what was compiled before is in the cache
        return "lost with its process"


def tasks() -> list[Task]:
    """All of them, those of each call and tunable in the order of the search, taking turns."""
    by_kernel: list[list[Task]] = []
    with compiling(), contextlib.ExitStack() as stack:
        for module in kernel_modules():
            stack.enter_context(replaced(module, LaunchRecorder))  # nothing is compiled yet
        for index, call in enumerate(few_calls()):
            for tunable, dtype, shape in search.asked(call):
                if tunable.name in HEADLINE:
                    configs = search.ordered(tunable, getattr(torch, dtype), shape)
                    by_kernel.append([(index, tunable.name, config) for config in configs])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_kernel))
    return [task for task in turns if task is not None]


@functools.cache
def few_calls() -> list[OpCall]:
    return list(headline_calls("cpu", full=False))


def compile_one(task: Task) -> str:
    """ "compiled", or the type of what was raised: that config is rejected on the GPU too."""
    index, name, config = task

    def choose(tunable, dtype, shape):
        return config if tunable.name == name else tunable.default_config(dtype, **shape)

    try:
        with compiling(), tuned.choosing(choose):
            few_calls()[index]()
    except Exception as error:  # the compiler may raise anything; the others are still compiled
        return type(error).__name__
    return "compiled"
