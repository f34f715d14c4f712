"""Contrastive losses on embeddings that are given: embedfuse's and its peers', forward and backward.

    python -m benchmarks.peers.losses PEER SIDE DTYPE ROWS POOL DIM  # memory of one call, in a fresh process

PEER is a name of PEERS, SIDE theirs or ours. Prints two numbers of bytes: what the call took beyond inputs
and gradients at its peak, and the whole process's peak. From Linux's /proc.
"""

import ctypes
import functools
import importlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

from embedfuse import losses
from embedfuse.ops import Matryoshka, info_nce

TEMPERATURE = 0.02
CACHED_ROWS = (
    256  # of sentence-transformers' cached loss; its default, 32, takes several times as long
)


@dataclass(frozen=True)
class Peer:
    """theirs, ours: (q, pool) -> loss, row i of the pool being the positive of row i. package: what theirs
    imports. symmetric: as many rows as the pool has."""

    theirs: Callable
    ours: Callable
    package: str = "torch"
    gpu_only: bool = False
    symmetric: bool = False


def ours(q: Tensor, pool: Tensor) -> Tensor:
    return info_nce(q, pool, temperature=TEMPERATURE).loss.mean()


def stored(q: Tensor, pool: Tensor) -> Tensor:
    return cross_entropy((q @ pool.T).float() / TEMPERATURE, diagonal(q))


def diagonal(q: Tensor) -> Tensor:
    return torch.arange(len(q), device=q.device)


def cached(module: str, q: Tensor, pool: Tensor) -> Tensor:
    """The loss half of CachedMultipleNegativesRankingLoss, with its backward pass."""
    model = torch.nn.Sequential(torch.nn.Identity())  # is asked for its first module alone
    loss = importlib.import_module(module).CachedMultipleNegativesRankingLoss(
        model, scale=1 / TEMPERATURE, mini_batch_size=CACHED_ROWS
    )
    columns = [[q], *([part] for part in pool.split(len(q)))]
    return loss.calculate_loss(columns, with_backward=True)


def cut_cross_entropy(q: Tensor, pool: Tensor, **options) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if q.is_cuda else "torch_compile"
    return linear_cross_entropy(q / TEMPERATURE, pool, diagonal(q), impl=impl, **options)


def inf_cl(q: Tensor, pool: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    return cal_flash_loss(q, pool, diagonal(q), 1 / TEMPERATURE).mean()


def liger(q: Tensor, pool: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(pool, q / TEMPERATURE, diagonal(q))


def memeff(q: Tensor, pool: Tensor) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(TEMPERATURE, normalized_inputs=True, stable=False)(q, pool)


def symmetric(q: Tensor, pool: Tensor) -> Tensor:
    loss = losses.SymmetricInfoNCE(TEMPERATURE, normalize=False)
    return loss.to(q.device)(q, pool)


def widths(q: Tensor) -> list[int]:
    return [q.shape[1] >> k for k in range(5)]


def width_by_width(q: Tensor, pool: Tensor) -> Tensor:
    """A loss per width, as sentence-transformers' MatryoshkaLoss calls what it wraps."""
    return sum(ours(*(normalize(x[:, :width], dim=1) for x in (q, pool))) for width in widths(q))


def matryoshka(q: Tensor, pool: Tensor) -> Tensor:
    matryoshka = Matryoshka(tuple(reversed(widths(q))))
    return info_nce(q, pool, temperature=TEMPERATURE, matryoshka=matryoshka).loss.mean(1).sum()


def siglip_kernel(q: Tensor, pool: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    scale, bias = torch.tensor((-math.log(TEMPERATURE), -10.0), device=q.device)
    return fused_siglip_loss(q, pool, scale.requires_grad_(), bias.requires_grad_())


def siglip(q: Tensor, pool: Tensor) -> Tensor:
    return losses.SigLIPLoss(TEMPERATURE, -10.0, normalize=False).to(q.device)(q, pool)


def siglip_stored(q: Tensor, pool: Tensor) -> Tensor:
    logits = (q @ pool.T).float() / TEMPERATURE - 10
    return (softplus(logits).sum() - logits.diagonal().sum()) / len(q)


THEIRS = "sentence_transformers.sentence_transformer.losses"
OURS = "embedfuse.integrations.sentence_transformers.losses"
PEERS = {
    "torch, logits stored": Peer(stored, ours),
    f"sentence-transformers, cached, {CACHED_ROWS} rows at a time": Peer(
        functools.partial(cached, THEIRS), functools.partial(cached, OURS), "sentence_transformers"
    ),
    "InfoNCE at five widths, one by one": Peer(width_by_width, matryoshka),
    "cut-cross-entropy": Peer(cut_cross_entropy, ours, "cut_cross_entropy"),
    "Inf-CL": Peer(inf_cl, ours, "inf_cl", gpu_only=True),
    "Liger": Peer(liger, ours, "liger_kernel", gpu_only=True),
    "memeff": Peer(memeff, symmetric, "memeff", gpu_only=True, symmetric=True),
    "siglip-kernel": Peer(siglip_kernel, siglip, "siglip_kernel", gpu_only=True, symmetric=True),
}


def embeddings(rows: int, pool: int, dim: int, dtype: torch.dtype, device: str = "cpu"):
    """Unit vectors that want a gradient, made without a second copy of the pool."""
    generator = torch.Generator(device).manual_seed(0)
    sides = [torch.empty(count, dim, dtype=dtype, device=device) for count in (rows, pool)]
    for side in sides:
        for part in side.split(4096):
            x = torch.randn(part.shape, generator=generator, device=device)
            part.copy_(normalize(x, dim=1))
    q, pool = sides
    # Positives that stand out a little: the loss is neither 0 nor that of chance.
    q.add_(pool[:rows], alpha=0.2).copy_(normalize(q.float(), dim=1))
    return q.requires_grad_(), pool.requires_grad_()


def both_passes(loss: Callable, q: Tensor, pool: Tensor) -> Tensor:
    q.grad = pool.grad = None
    value = loss(q, pool)
    if value.requires_grad:  # not where the loss did it itself
        value.backward()
    return value.detach()


def peak(name: str) -> int:
    """VmHWM, VmRSS: bytes of this process, at its peak and now."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


def main() -> None:
    name, side, dtype, *shape = sys.argv[1:]
    loss = getattr(PEERS[name], side)
    both_passes(loss, *embeddings(8, 16, 64, getattr(torch, dtype)))  # imports and compiles
    q, pool = embeddings(*map(int, shape), getattr(torch, dtype))
    before = peak("VmHWM")
    # What is freed but still held would serve the call without being counted; the embeddings are all read
    # once, so that none of their pages is fetched for the call's account.
    ctypes.CDLL(None).malloc_trim(0)
    q.sum(), pool.sum()
    Path("/proc/self/clear_refs").write_text("5")  # from here on a new peak
    start = peak("VmRSS")
    both_passes(loss, q, pool)
    after = peak("VmHWM")
    print(after - start - q.grad.nbytes - pool.grad.nbytes, max(before, after))


if __name__ == "__main__":
    main()
