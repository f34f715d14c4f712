"""MaxSim compared with other libraries: one query and many documents, and all pairs with their gradient.

Calls of peer and embedfuse on the same arrays are interleaved; the ratio is that of their medians. maxsim-cpu
and numkong take fp32 only (numkong preselects in packed int8), so bf16 and int8 of embedfuse are compared
with that. A skip names a library that is not installed.
"""

import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness.timing import DEVICE
from embedfuse import ops

ROUNDS = 15
DOCUMENTS = {128: 1000, 1024: 100}

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares CPU paths")


@functools.lru_cache(maxsize=1)
def texts(*shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(*shape, generator=generator) for shape in shapes)
    return [torch.nn.functional.normalize(x, dim=-1) for x in sides]


def rerank_texts(dim: int) -> list[torch.Tensor]:
    return texts((32, dim), (DOCUMENTS[dim], 300, dim))


def einsum(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return torch.einsum("id,bjd->bij", q, d).amax(2).sum(1)


def ours(q: torch.Tensor, d: torch.Tensor, dtype: str) -> Callable:
    """A call of maxsim in this dtype; the documents are converted beforehand."""
    if dtype == "int8":
        d = ops.quantize_int8(d)
    else:
        q, d = q.to(getattr(torch, dtype)), d.to(getattr(torch, dtype))
    return lambda: ops.maxsim(q[None], d)[0]


def compare(benchmark, peer: str, theirs: Callable, mine: Callable, dtypes: tuple, **info):
    seconds = {theirs: [], mine: []}
    for _ in range(ROUNDS):
        for run in (theirs, mine):
            start = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - start)
    medians = [statistics.median(seconds[run]) for run in (theirs, mine)]
    benchmark.extra_info.update(
        peer=peer,
        peer_dtype=dtypes[0],
        dtype=dtypes[1],
        peer_seconds=medians[0],
        seconds=medians[1],
        speedup=medians[0] / medians[1],
        **info,
    )
    benchmark.pedantic(lambda: None)


def workload(dim: int) -> str:
    return f"MaxSim, 32 tokens against {DOCUMENTS[dim]:,} x 300, d = {dim}"


def check(found: torch.Tensor, wanted: torch.Tensor, dtype: str):
    """Rounding to int8 or bf16 leaves a mean error below a thousandth of the score."""
    limit = {"float32": 1e-6, "float16": 1e-4}.get(dtype, 1e-3)
    assert (found - wanted).abs().mean() <= limit * wanted.abs().mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("dim", DOCUMENTS)
def test_vs_einsum(dim, dtype, benchmark):
    q, d = rerank_texts(dim)
    mine = ours(q, d, dtype)
    check(mine(), einsum(q, d), dtype)
    peer_dtype = "float32" if dtype == "int8" else dtype
    a, b = (x.to(getattr(torch, peer_dtype)) for x in (q, d))
    dtypes = peer_dtype, dtype
    compare(benchmark, "torch einsum", lambda: einsum(a, b), mine, dtypes, workload=workload(dim))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_vs_maxsim_cpu(dtype, benchmark):
    peer = pytest.importorskip("maxsim_cpu", reason="the peer maxsim-cpu is not installed")
    q, d = rerank_texts(128)
    mine, arrays = ours(q, d, dtype), (q.numpy(), d.numpy())
    check(mine(), torch.from_numpy(np.asarray(peer.maxsim_scores(*arrays))), dtype)
    theirs = functools.partial(peer.maxsim_scores, *arrays)
    compare(benchmark, "maxsim-cpu", theirs, mine, ("float32", dtype), workload=workload(128))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dim", DOCUMENTS)
def test_vs_numkong(dim, dtype, benchmark):
    peer = pytest.importorskip("numkong", reason="the peer numkong is not installed")
    q, d = rerank_texts(dim)
    mine, wanted = ours(q, d, dtype), einsum(q, d)
    packed_q, packed = peer.maxsim_pack(q.numpy()), [peer.maxsim_pack(x.numpy()) for x in d]
    threads = torch.get_num_threads()
    parts = [packed[i::threads] for i in range(threads)]

    def scores(part: list) -> list[float]:
        return [peer.maxsim_packed(packed_q, x) for x in part]

    with ThreadPoolExecutor(threads) as pool:

        def theirs() -> list[list[float]]:
            return list(pool.map(scores, parts))

        scored = torch.empty(len(packed))
        for i, part in enumerate(theirs()):
            scored[i::threads] = 32 - torch.tensor(part)  # numkong sums 1 - cosine
        errors = [(x - wanted).abs().mean().item() for x in (scored, mine())]
        assert errors[1] < errors[0] / 3
        name = f"{workload(dim)}; mean errors {errors[0]:.2g} and {errors[1]:.2g}"
        compare(benchmark, "numkong", theirs, mine, ("packed", dtype), workload=name)


def peak_bytes(call: Callable) -> int:
    """Peak of what `call` adds to the memory of the process; Linux only."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def kib(key: str) -> int:
        return int(next(x for x in status.read_text().splitlines() if x.startswith(key)).split()[1])

    before = kib("VmRSS")
    call()
    return 1024 * (kib("VmHWM") - before)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_pairs_vs_torch(dtype, backward, benchmark):
    """Torch in fp32 on the same values: torch's einsum in bf16 takes many times as long."""
    sides = [x.to(getattr(torch, dtype)) for x in texts((128, 32, 128), (128, 300, 128))]
    weights = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))

    def run(function: Callable, dtype: torch.dtype) -> Callable:
        q, d = (x.to(dtype, copy=True).requires_grad_(backward) for x in sides)

        def call():
            scores = function(q, d)
            return torch.autograd.grad((scores * weights).sum(), (q, d)) if backward else [scores]

        return call

    def products(q, d):
        return torch.einsum("aid,bjd->abij", q, d).amax(3).sum(2)

    theirs, mine = run(products, torch.float32), run(ops.maxsim, getattr(torch, dtype))
    mine()  # buffers that are kept afterwards do not count for the call
    for a, b in zip(mine(), theirs(), strict=True):
        cosine = torch.nn.functional.cosine_similarity(
            a.double().flatten(), b.double().flatten(), 0
        )
        assert cosine > (0.9999 if dtype == "bfloat16" else 0.999999)
    memory = [peak_bytes(call) / 2**20 for call in (theirs, mine)]
    name = f"MaxSim, 128 x 32 against 128 x 300, d = 128, forward{' and backward' * backward}"
    name += f"; {memory[0]:,.0f} and {memory[1]:,.0f} MiB"
    compare(benchmark, "torch einsum", theirs, mine, ("float32", dtype), workload=name)
