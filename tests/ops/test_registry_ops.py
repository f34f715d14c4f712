"""What every op must do, on every backend that takes CPU tensors. Runs off registry.OPS alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import embedfuse
from embedfuse import config, testing
from embedfuse.registry import OPS

# (backend, ISA): the C++ kernels once per instruction set that they are compiled for.
CPP = [("cpp", isa) for isa in config.CPU_ISAS]
VERSIONS = [("reference", None), *CPP]
BACKENDS = [("reference", None), ("cpp", None)]


# torch's GEMM takes part, which rounds by its number of threads: the same bits each time, by one number.
TORCH_GEMM = (
    "info_nce_forward",
    "info_nce_backward",
    "info_nce_matryoshka_forward",
    "info_nce_matryoshka_backward",
)


def per_op(versions):
    params = [(op, *version) for op in OPS.values() for version in versions]
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


# Not the reference: it is what the others are held to.
@per_dtype
@per_op(CPP)
def test_numerics(version, dtype):
    op, backend = version
    for args in op.make_samples("cpu", dtype, "test"):
        testing.assert_close_to_reference(op, args, backend)


@per_dtype
@per_op(VERSIONS)
def test_outputs_are_fully_written(version, dtype):
    op, _ = version
    for args in op.make_samples("cpu", dtype, "test"):
        plain = testing.run(op, args)
        with testing.poisoned_empty():
            assert torch.empty(1).isnan()
            assert_same(testing.run(op, args), plain)


# Not the reference: torch's own kernels do not promise it.
@per_dtype
@per_op(CPP)
def test_thread_count_changes_no_bit(version, dtype, restore_threads):
    op, _ = version
    for args in op.make_samples("cpu", dtype, "test"):
        torch.set_num_threads(2 if op.name in TORCH_GEMM else 1)
        alone = testing.run(op, args)
        torch.set_num_threads(2)
        assert_same(testing.run(op, args), alone)


@per_dtype
@per_op(BACKENDS)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@per_op(BACKENDS)
def test_opcheck(version, dtype):
    op, _ = version
    # Every fifth: samples vary in a period of three, and a check takes 0.3 s.
    for args in op.make_samples("cpu", dtype, "test")[::5]:
        # opcheck cannot clone a tensor without elements.
        if all(arg.numel() for arg in args if isinstance(arg, torch.Tensor)):
            torch.library.opcheck(op.overload, args)


@per_op(BACKENDS)
def test_compiled_call_is_the_eager_one(version):
    op, _ = version
    for args in op.make_samples("cpu", torch.float32, "test")[::5]:
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *args, op=op: testing.run(op, args), fullgraph=True, backend="aot_eager"
        )
        assert_same(compiled(*args), testing.run(op, args))


@per_op([("cpp", None)])
def test_inductor(version):
    op, _ = version
    args = op.make_samples("cpu", torch.float32, "test")[0]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *args: [2 * y for y in outputs(testing.run(op, args))], fullgraph=True
    )
    assert_same(tuple(compiled(*args)), tuple(2 * y for y in outputs(testing.run(op, args))))
