"""Every op on every backend that takes CUDA tensors; streams, graphs and offsets that need 64 bits."""

import math

import pytest
import torch

from embedfuse import ops, testing
from embedfuse.ops.pool_normalize import POOLINGS
from embedfuse.registry import OPS, use_backend
from tests import pool_normalize_checks as checks

pytestmark = pytest.mark.gpu

VERSIONS = [(op, backend) for op in OPS.values() for backend in testing.backends(op, "cuda")]
POOL_BACKENDS = testing.backends(OPS["pool_normalize"], "cuda")

per_version = pytest.mark.parametrize(
    "version", VERSIONS, indirect=True, ids=[f"{op.name}-{backend}" for op, backend in VERSIONS]
)
per_dtype = pytest.mark.parametrize(
    "dtype", testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
per_pool_backend = pytest.mark.parametrize(
    "version", [(OPS["pool_normalize"], b) for b in POOL_BACKENDS], indirect=True, ids=POOL_BACKENDS
)


@pytest.fixture
def version(request):
    """An op and its backend, which is forced."""
    op, backend = request.param
    if reason := op.refusal(backend, "cuda", torch.float32):
        pytest.skip(reason)
    with use_backend(backend):
        yield op, backend


@per_dtype
@per_version
def test_samples(version, dtype):
    op, backend = version
    for args in op.make_samples("cuda", dtype, "test"):
        testing.assert_close_to_reference(op, args, backend)


@per_version
def test_runs_on_the_current_stream(version):
    op, _ = version
    args = op.make_samples("cuda", torch.float32, "test")[0]
    expected = testing.run(op, args)  # rope_ returns nothing: what it writes is compared
    late = torch.full_like(args[0], float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # A kernel on another stream would not wait, and would read NaN.
        torch.cuda._sleep(100_000_000)
        late.copy_(args[0])
        got = testing.run(op, (late, *args[1:]))
    stream.synchronize()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@per_dtype
@per_pool_backend
def test_pool_normalize_nan(version, dtype, pooling):
    checks.check_nan(version[1], "cuda", dtype, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
@per_pool_backend
def test_pool_normalize_in_a_graph(version, pooling):
    rows = torch.randn(4, 9, 100, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(4, 9, dtype=torch.int64, device="cuda")

    def call():
        return ops.pool_normalize(rows, attention_mask=mask, pooling=pooling)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    rows.copy_(torch.randn(4, 9, 100))
    mask[:, 6:] = 0
    expected = call()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def large():
    wanted = 2 * math.prod(checks.LARGE_SHAPE) + 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < wanted:
        pytest.skip(f"needs {wanted / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free")
    return torch.full(checks.LARGE_SHAPE, float("nan"), dtype=torch.bfloat16, device="cuda")


# 8.6 GB: of several processes one runs it.
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize(("layout", "pooling"), checks.LARGE_CASES)
@per_pool_backend
def test_offsets_beyond_32_bits(version, large, layout, pooling):
    checks.check_large_offsets(large, layout, pooling)
