"""What every op must do, on every backend that takes CPU tensors. Runs off registry.OPS alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import embedfuse
from embedfuse import testing
from embedfuse.registry import OPS
from tests.isas import isas_of

# torch's GEMM takes part, which rounds by its number of threads: the same bits each time, by one number.
TORCH_GEMM = (
    "info_nce_forward",
    "info_nce_backward",
    "info_nce_matryoshka_forward",
    "info_nce_matryoshka_backward",
)


def reference(op):
    return [(op, "reference", None)]


def cpp(op):
    return [(op, "cpp", None)]


def every_isa(op):
    """The C++ kernels once per instruction set that they are compiled for."""
    return [(op, "cpp", isa) for isa in isas_of(op.name)]


def per_op(*versions):
    params = [version for op in OPS.values() for of_op in versions for version in of_op(op)]
    ids = ["-".join(filter(None, (op.name, backend, isa))) for op, backend, isa in params]
    return pytest.mark.parametrize("version", params, indirect=True, ids=ids)


per_dtype = pytest.mark.parametrize(
    "dtype", testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture
def version(request):
    """An op and its backend, which is forced; for the C++ one with its instruction set."""
    op, backend, isa = request.param
    if backend not in ("reference", *testing.backends(op, "cpu")):
        pytest.skip(f"{op.name} has no version in {backend}")
    if backend == "cpp":
        request.getfixturevalue("cpu_module")
    if isa is not None:
        request.getfixturevalue("use_isa")(isa)
    with embedfuse.use_backend(backend):
        yield op, backend


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def assert_same(got, expected):
    for a, b in zip(outputs(got), outputs(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# Not the reference: it is what the others are held to. Outputs are poisoned, so all are written.
@per_dtype
@per_op(every_isa)
def test_numerics(version, dtype):
    op, backend = version
    for args in op.make_samples("cpu", dtype, "test"):
        testing.assert_close_to_reference(op, args, backend)


@per_dtype
@per_op(reference)
def test_the_reference_writes_all_outputs(version, dtype):
    op, _ = version
    for args in op.make_samples("cpu", dtype, "test"):
        plain = testing.run(op, args)
        with testing.poisoned_empty():
            assert torch.empty(1).isnan()
            assert_same(testing.run(op, args), plain)


# Not the reference: torch's own kernels do not promise it.
@per_dtype
@per_op(every_isa)
def test_thread_count_changes_no_bit(version, dtype, restore_threads):
    op, _ = version
    for args in op.make_samples("cpu", dtype, "test"):
        torch.set_num_threads(2 if op.name in TORCH_GEMM else 1)
        alone = testing.run(op, args)
        torch.set_num_threads(2)
        assert_same(testing.run(op, args), alone)


@per_dtype
@per_op(cpp)
def test_concurrent_calls(version, dtype):
    op, backend = version
    samples = op.make_samples("cpu", dtype, "test")
    expected = [testing.run(op, args) for args in samples]

    def call_all(_):
        with embedfuse.use_backend(backend):  # a new thread starts without the caller's choice
            return [testing.run(op, args) for args in samples]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(call_all, range(8)):
            for got, want in zip(results, expected, strict=True):
                assert_same(got, want)


# Each in one dtype: test_numerics compares dtypes and shapes of the two in all.
OPCHECKED = [(*reference(op)[0], torch.bfloat16) for op in OPS.values()]
OPCHECKED += [(*cpp(op)[0], torch.float32) for op in OPS.values()]


@pytest.mark.parametrize(
    ("version", "dtype"),
    [pytest.param(case[:3], case[3], id=f"{case[0].name}-{case[1]}") for case in OPCHECKED],
    indirect=["version"],
)
def test_opcheck(version, dtype):
    op, _ = version
    # Every fifth: samples vary in a period of three, and a check takes 0.3 s.
    for args in op.make_samples("cpu", dtype, "test")[::5]:
        # opcheck cannot clone a tensor without elements.
        if all(arg.numel() for arg in args if isinstance(arg, torch.Tensor)):
            torch.library.opcheck(op.overload, args)


# By inductor: test_inductor.py.
@per_op(cpp)
def test_compiled_call_is_the_eager_one(version):
    op, _ = version
    for args in op.make_samples("cpu", torch.float32, "test")[::5]:
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *args, op=op: testing.run(op, args), fullgraph=True, backend="aot_eager"
        )
        assert_same(compiled(*args), testing.run(op, args))
