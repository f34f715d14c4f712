"""One query of 32 tokens against documents of 300, beside torch's einsum and maxsim-cpu.

Peer and embedfuse take the same arrays in turn; the ratio is that of the calls' medians. maxsim-cpu takes
fp32 alone, so embedfuse's bf16 stands against its fp32; where it is not installed, the skip names it.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from benchmarks.conftest import DEVICE
from embedfuse import ops

ROUNDS = 15
DOCUMENTS = {128: 1000, 1024: 100}

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares CPU paths")


def texts(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((32, dim), (DOCUMENTS[dim], 300, dim))
    q, d = (torch.randn(*shape, generator=generator) for shape in shapes)
    return torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(d, dim=-1)


def einsum(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return torch.einsum("id,bjd->bij", q, d).amax(2).sum(1)


def compare(benchmark, peer: str, theirs: Callable, ours: Callable, dim: int, dtype, peer_dtype):
    seconds = {theirs: [], ours: []}
    for _ in range(ROUNDS):
        for run in (theirs, ours):
            start = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - start)
    medians = [statistics.median(seconds[run]) for run in (theirs, ours)]
    benchmark.extra_info.update(
        peer=peer,
        workload=f"MaxSim, 32 tokens against {DOCUMENTS[dim]:,} x 300, d = {dim}",
        dtype=dtype,
        peer_dtype=peer_dtype,
        peer_seconds=medians[0],
        seconds=medians[1],
        speedup=medians[0] / medians[1],
    )
    benchmark.pedantic(lambda: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dim", DOCUMENTS)
def test_beside_einsum(dim, dtype, benchmark):
    q, d = (x.to(getattr(torch, dtype)) for x in texts(dim))
    found, wanted = ops.maxsim(q[None], d)[0], einsum(q.float(), d.float())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    theirs, ours = lambda: einsum(q, d), lambda: ops.maxsim(q[None], d)
    compare(benchmark, "torch einsum", theirs, ours, dim, dtype, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_maxsim_cpu(dtype, benchmark):
    peer = pytest.importorskip("maxsim_cpu", reason="the peer maxsim-cpu is not installed")
    q, d = (x.to(getattr(torch, dtype)) for x in texts(128))
    arrays = [np.ascontiguousarray(x.float().numpy()) for x in (q, d)]
    wanted = torch.from_numpy(np.asarray(peer.maxsim_scores(*arrays)))
    torch.testing.assert_close(ops.maxsim(q[None], d)[0], wanted, rtol=1e-4, atol=1e-4)
    theirs, ours = lambda: peer.maxsim_scores(*arrays), lambda: ops.maxsim(q[None], d)
    compare(benchmark, "maxsim-cpu", theirs, ours, 128, dtype, "float32")
