"""info_nce, forward and backward, compared with other libraries and with three GEMMs of the same size.

Calls of both sides on the same embeddings are interleaved; the ratio is that of their medians. Loss and
gradients are compared before anything is timed. Memory is that of one call in a fresh process. TFLOP/s counts
the three products of the loss and its gradient, 6 rows pool dim operations, also where an implementation
computes some of them twice, as ours does, which stores no logits. A skip names a peer that is not installed,
raises or gives other values.
"""

import functools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from benchmarks.harness.record import one_line
from benchmarks.harness.timing import DEVICE, interleaved
from benchmarks.peers.losses import PEERS, both_passes, embeddings, ours

ROUNDS = 3
SHAPE = (1024, 65536, 1024)
SQUARE = (8192, 8192, 1024)  # as many scores
MILLION = (256, 1_000_000, 256)
MEMORY_OF_A_MILLION = 3e9
DTYPES = ["float32", "bfloat16"]
# Relative to the largest element of the gradients. Peers round other intermediate values to bf16.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}

pytestmark = pytest.mark.covers("info_nce_forward", "info_nce_backward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PEERS)
def test_vs_peer(name, dtype, benchmark):
    peer = PEERS[name]
    if peer.gpu_only and DEVICE == "cpu":
        pytest.skip(f"the peer {name} runs on a GPU only")
    pytest.importorskip(peer.package, reason=f"the peer {name} is not installed")
    shape = SQUARE if peer.symmetric else SHAPE
    q, pool = embeddings(*shape, getattr(torch, dtype), DEVICE)
    try:
        agree(peer, q, pool, TOLERANCE[dtype])
    except Exception as error:  # a peer may raise anything; the others are still measured
        if peer.package == "torch":
            raise
        pytest.skip(f"the peer {name} fails: {one_line(error)}")
    theirs, mine = (functools.partial(both_passes, f, q, pool) for f in (peer.theirs, peer.ours))
    bytes_of = [memory(name, side, dtype, shape)[0] for side in ("theirs", "ours")]
    record(benchmark, name, dtype, shape, wall_seconds(theirs, mine), bytes_of)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vs_gemms(dtype, benchmark):
    q, pool = embeddings(*SHAPE, getattr(torch, dtype), DEVICE)
    scores = torch.empty(len(q), len(pool), dtype=q.dtype, device=DEVICE)
    grad_q, grad_pool = torch.empty_like(q), torch.empty_like(pool)

    @torch.no_grad()
    def gemms():
        torch.mm(q, pool.T, out=scores)
        torch.mm(scores, pool, out=grad_q)
        torch.mm(scores.T, q, out=grad_pool)

    mine = functools.partial(both_passes, ours, q, pool)
    record(benchmark, "the three GEMMs only", dtype, SHAPE, wall_seconds(gemms, mine), [None, None])


@pytest.mark.skipif(DEVICE != "cpu", reason="measures this process's memory")
def test_a_million_documents(benchmark):
    q, pool = embeddings(*MILLION, torch.float32)
    mine = functools.partial(both_passes, ours, q, pool)
    seconds = interleaved([mine], 2, warmup=0)[0].wall
    del q, pool, mine
    extra, whole = memory("torch, logits stored", "ours", "float32", MILLION)
    assert whole <= MEMORY_OF_A_MILLION
    benchmark.extra_info["process_bytes"] = whole
    record(benchmark, None, "float32", MILLION, [None, seconds], [None, extra])


def agree(peer, q, pool, tolerance: float) -> None:
    values = []
    for loss in (peer.theirs, peer.ours):
        value = both_passes(loss, q, pool)
        values.append([value.float(), q.grad.float(), pool.grad[:: len(pool) // 512].float()])
    for wanted, got in zip(*values, strict=True):
        atol = tolerance * wanted.abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def wall_seconds(theirs: Callable, mine: Callable) -> list[float]:
    """Median seconds of both."""
    return [times.wall for times in interleaved([theirs, mine], ROUNDS, warmup=0)]


@functools.cache
def memory(name: str, side: str, dtype: str, shape: tuple) -> tuple[int, int]:
    """Bytes in addition to inputs and gradients, and of the whole process (on a GPU: of all tensors)."""
    if DEVICE == "cpu":
        call = [
            sys.executable,
            "-m",
            "benchmarks.peers.losses",
            name,
            side,
            dtype,
            *map(str, shape),
        ]
        printed = subprocess.run(call, check=True, capture_output=True, text=True).stdout
        return tuple(map(int, printed.split()))
    q, pool = embeddings(*shape, getattr(torch, dtype), DEVICE)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    both_passes(getattr(PEERS[name], side), q, pool)
    peak = torch.cuda.max_memory_allocated()
    return peak - start - q.grad.nbytes - pool.grad.nbytes, peak


def record(benchmark, peer: str | None, dtype: str, shape: tuple, seconds, bytes_of) -> None:
    rows, pool, dim = shape
    benchmark.extra_info.update(
        loss=f"{rows:,} x {pool:,}, d = {dim:,}",
        loss_peer=peer,
        dtype=dtype,
        peer_seconds=seconds[0],
        seconds=seconds[1],
        peer_bytes=bytes_of[0],
        bytes=bytes_of[1],
        flops=6 * rows * pool * dim,
        logits_bytes=rows * pool * getattr(torch, dtype).itemsize,
    )
    benchmark.pedantic(lambda: None)
