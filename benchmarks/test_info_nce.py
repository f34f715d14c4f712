"""InfoNCE forward and backward, 1,024 queries against a pool of 65,536, d = 1024.

Beside torch with stored logits, and beside torch's three GEMMs alone (6 B N d operations), which is the
floor of any implementation that stores the logits; ours computes them twice (8 B N d). All take the same
arrays in turn.
"""

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.conftest import DEVICE
from embedfuse import ops

ROUNDS = 3
ROWS, COLUMNS, DEPTH, TEMPERATURE = 1024, 65536, 1024, 0.02

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares CPU paths")


def gradients(loss: Callable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss(*inputs).mean(), inputs)


def stored(q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(len(q))
    return torch.nn.functional.cross_entropy(q @ pool.T / TEMPERATURE, labels, reduction="none")


def fused(q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    return ops.info_nce(q, pool, temperature=TEMPERATURE).loss


def gemms(q: torch.Tensor, pool: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        logits = q @ pool.T
        return logits @ pool, logits.T @ q


PEERS = {
    "torch, stored logits": lambda q, pool: gradients(stored, q, pool),
    "torch, the GEMMs alone": gemms,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", PEERS)
def test_beside(peer, dtype, benchmark):
    generator = torch.Generator().manual_seed(0)
    q, pool = (torch.randn(n, DEPTH, generator=generator) for n in (ROWS, COLUMNS))
    pool[:ROWS] += q
    q, pool = (torch.nn.functional.normalize(x, dim=1).to(getattr(torch, dtype)) for x in (q, pool))
    # A bf16 score of up to 0.8 is rounded by up to 0.002.
    tolerance = {"float32": 1e-4, "bfloat16": 0.002 / TEMPERATURE}[dtype]
    few = q[:64], pool[:2048]
    wanted = stored(*(x.float() for x in few))
    torch.testing.assert_close(fused(*few), wanted, rtol=0, atol=tolerance)
    q, pool = q.requires_grad_(), pool.requires_grad_()
    calls = {"peer": lambda: PEERS[peer](q, pool), "ours": lambda: gradients(fused, q, pool)}
    seconds = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    benchmark.extra_info.update(
        peer=peer,
        workload=f"InfoNCE with gradients, {ROWS:,} x {COLUMNS:,}, d = {DEPTH}",
        dtype=dtype,
        peer_dtype=dtype,
        peer_seconds=best["peer"],
        seconds=best["ours"],
        speedup=best["peer"] / best["ours"],
    )
    benchmark.pedantic(lambda: None)
