"""Every op of the registry on its "bench" samples, per backend and dtype.

The values of each version are checked first: where they are wrong, the test fails and nothing is timed.
Caches are emptied before every call: in a model the data of other layers replaces their content.
"""

import functools
import statistics

import pytest
import torch

import embedfuse
from benchmarks.harness.peaks import DTYPES
from benchmarks.harness.timing import DEVICE, cuda_seconds
from embedfuse import testing
from embedfuse.cli.bench import describe
from embedfuse.registry import OPS

ROUNDS = 15


@functools.lru_cache(maxsize=1)
def samples_of(op, dtype):
    return op.make_samples(DEVICE, dtype, "bench")


def pytest_generate_tests(metafunc):
    cases = [
        pytest.param(op, dtype, index, backend, id=f"{op.name}-{name_of(dtype)}-{index}-{backend}")
        for op in OPS.values()
        if testing.backends(op, DEVICE)
        for dtype in DTYPES
        for index in range(len(samples_of(op, DTYPES[0])))
        for backend in ("reference", *testing.backends(op, DEVICE))
    ]
    metafunc.parametrize(("op", "dtype", "index", "backend"), cases)


def test_op(op, dtype, index, backend, benchmark, peaks, flush):
    if reason := op.refusal(backend, DEVICE, dtype):
        pytest.skip(reason)
    args = samples_of(op, dtype)[index]
    if backend != "reference":
        testing.assert_close_to_reference(op, args, backend)
    with embedfuse.use_backend(backend):
        benchmark.pedantic(op, args, setup=flush, rounds=ROUNDS, warmup_rounds=2)
        if DEVICE == "cuda":  # the wall clock above measures the launch only
            seconds = statistics.median(cuda_seconds(lambda: op(*args), ROUNDS, before=flush))
        else:
            seconds = benchmark.stats.stats.median
    cost = op.count_cost(*args)
    floor = peaks.floor(cost, dtype)
    benchmark.extra_info.update(
        op=op.name,
        sample=describe(op, args),
        dtype=name_of(dtype),
        backend=backend,
        seconds=seconds,
        gb_per_s=cost.bytes / seconds / 1e9,
        tflop_per_s=cost.flops / seconds / 1e12,
        percent_of_peak=100 * floor / seconds,
        peak_gb_per_s=peaks.bandwidth / 1e9,
        peak_tflop_per_s=peaks.flops[dtype] / 1e12,
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
