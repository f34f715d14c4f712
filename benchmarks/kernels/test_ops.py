"""Every op of the registry on its "bench" samples, per backend and dtype.

A version whose results are wrong gets no speed: its correctness check runs first, and fails the test.
Caches are emptied before every call: in a model, other layers' data went through them since.
"""

import functools
import statistics

import pytest
import torch

import embedfuse
from benchmarks.conftest import DEVICE
from benchmarks.harness.peaks import DTYPES, cuda_seconds
from embedfuse import testing
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
        if DEVICE == "cuda":  # the wall clock above saw the launch alone
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


def describe(op, args) -> str:
    """Shapes and settings: "hidden_states 64x512x1024, mean, normalize"."""
    parts = []
    for argument, value in zip(op.overload._schema.arguments, args, strict=True):
        if isinstance(value, torch.Tensor):
            parts.append(f"{argument.name} {'x'.join(map(str, value.shape))}")
        elif isinstance(value, list):
            shapes = ("x".join(map(str, x.shape)) for x in value)
            parts.append(f"{argument.name} {' + '.join(shapes)}")
        elif value is True:
            parts.append(argument.name)
        elif isinstance(value, str):
            parts.append(value)
    return ", ".join(parts)
