"""The kernels among the rows of targets.py, on a GPU, compared with plain torch and with installed libraries.

Each row is timed between CUDA events, with the inputs removed from the caches, calls of embedfuse and peers
interleaved. Then its values are compared with torch: a row that is wrong fails and keeps its figures. GB/s
and TFLOP/s count what the call must move and compute at least; percent is of the peaks measured in the same
run.
Memory is in addition to the inputs. A rehearsal runs all of it on the CPU at small sizes.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks.gpu.checks import (
    assert_close,
    assert_same_direction,
    check_loss,
    check_part,
    gradients,
    maxsim_products,
)
from benchmarks.gpu.rows import figures
from benchmarks.harness.rehearsal import REHEARSAL, size
from benchmarks.harness.timing import DEVICE
from benchmarks.peers import gpu as gpu_peers
from benchmarks.peers import losses
from benchmarks.peers.gpu import Peer
from benchmarks.peers.losses import TEMPERATURE, embeddings, stored
from embedfuse import ops
from embedfuse.registry import Cost

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not REHEARSAL, reason="needs a GPU")
# Other libraries come last (conftest.py) and get the time that is left.
COMPARED = pytest.mark.parametrize("compared_with", ["torch", "other_libraries"])


@pytest.fixture
def measure(benchmark, peaks, flush) -> Callable:
    def run(row, ours, cost, peers, start, check, **info) -> None:
        found = figures(peaks, flush, row, ours, cost, peers, start, check)
        benchmark.extra_info.update(found, **info)
        benchmark.pedantic(lambda: None)
        check(ours())

    return run


def peers_of(
    compared_with: str, of_torch: dict[str, Peer], others: dict[str, Peer]
) -> dict[str, Peer]:
    """The peers of a row; a skip where no other library is installed."""
    if compared_with == "torch":
        return of_torch
    if not any(peer.is_installed() for peer in others.values()):
        pytest.skip(f"not installed: {', '.join(others)}")
    return others


def texts(*shape: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    return normalize(x, dim=-1)


EINSUM = {"torch einsum, bf16": Peer(lambda q, d: functools.partial(maxsim_products, q, d))}


@COMPARED
@pytest.mark.covers("maxsim")
@pytest.mark.parametrize(
    ("documents", "dim", "dtype"),
    [(1000, 128, "bf16"), (10_000, 128, "bf16"), (10_000, 128, "int8"), (1000, 1024, "bf16")],
)
def test_maxsim(documents, dim, dtype, compared_with, measure):
    others = gpu_peers.MAXSIM_INT8 if dtype == "int8" else gpu_peers.MAXSIM
    peers = peers_of(compared_with, EINSUM, others)
    row = f"MaxSim 1x32, {documents:,}x300, d={dim}, {dtype}"
    documents = size(documents, 20)
    q, d = texts(1, 32, dim), texts(documents, 300, dim)
    documents_of_dtype = ops.quantize_int8(d) if dtype == "int8" else d
    ours = functools.partial(ops.maxsim, q, documents_of_dtype)
    wanted = maxsim_products(q, d)

    def check(found: torch.Tensor) -> None:
        assert_close(found, wanted, 0.01, "scores")  # bf16's rounding of the products

    read = d.numel() * (1 if dtype == "int8" else 2) + q.nbytes + 4 * documents
    read += 4 * d.shape[0] * d.shape[1] * (dtype == "int8")  # a scale for each token
    cost = Cost(bytes=read, flops=2 * 32 * 300 * documents * dim)
    measure(row, ours, cost, peers, lambda function: function(q, d), check)


@COMPARED
@pytest.mark.covers("maxsim", "segment_sum")
@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
def test_all_pairs(passes, compared_with, measure):
    peers, backward = peers_of(compared_with, EINSUM, gpu_peers.MAXSIM), passes != "forward"
    pairs = size(128, 6)
    q, d = (x.requires_grad_(backward) for x in (texts(pairs, 32, 128), texts(pairs, 300, 128)))
    weights = torch.randn(pairs, pairs, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def start(function: Callable) -> Callable:
        scores = function(q, d)

        def call() -> tuple[torch.Tensor, ...]:
            if not backward:
                return (scores(),)
            return torch.autograd.grad((scores() * weights).sum(), (q, d))

        return call

    # In bf16 products are often equal, and then another token than in fp32 may get the gradient.
    exact = start(lambda q, d: lambda: maxsim_products(q.float(), d.float()))()

    def check(found: tuple[torch.Tensor, ...]) -> None:
        for what, a, b in zip(("q" if backward else "scores", "d"), found, exact, strict=False):
            assert_same_direction(a, b, 0.999, what)

    ours = start(lambda q, d: functools.partial(ops.maxsim, q, d))
    # Backward sums over the tokens of the maxima and reads each side once more.
    flops = 2 * pairs * 32 * pairs * 300 * 128
    cost = Cost(bytes=(3 if backward else 1) * (q.nbytes + d.nbytes), flops=flops)
    row = f"MaxSim 128x32, 128x300, d=128, bf16, {passes}"
    measure(row, ours, cost, peers, start, check)


@COMPARED
@pytest.mark.covers("info_nce_forward", "info_nce_backward")
@pytest.mark.parametrize(
    ("rows", "pool", "dim", "kind"),
    [
        (4096, 131_072, 1024, ""),
        (65_536, 65_536, 768, ""),
        (8192, 2**20, 1024, ""),
        (8192, 2**20, 1024, ", frozen"),
    ],
)
def test_info_nce(rows, pool, dim, kind, compared_with, measure):
    """Frozen: only the positives among the documents get a gradient.

    Peers cannot leave gradients out, so they take all documents joined, and those gradients are dropped.
    """
    others = gpu_peers.INFO_NCE_SQUARE if rows == pool else gpu_peers.INFO_NCE
    peers = peers_of(compared_with, {"torch, logits stored": Peer(stored)}, others)
    row = f"InfoNCE {rows:,} x {pool:,}, d={dim}, bf16{kind}"
    rows, pool = size(rows, 32), size(pool, 32 if rows == pool else 64)
    q, documents = embeddings(rows, pool, dim, torch.bfloat16, DEVICE)
    sides, loss, joined = (q, documents), losses.ours, lambda x: x
    if kind:
        bank = documents[rows:].detach()
        sides = q, documents[:rows].detach().clone().requires_grad_()

        def loss(q, d):
            return ops.info_nce(q, d, bank=bank, temperature=TEMPERATURE).loss.mean()

        def joined(d):
            return torch.cat((d, bank))

    def start(function: Callable) -> Callable:
        return functools.partial(gradients, lambda q, d: function(q, joined(d)), *sides)

    ours = functools.partial(gradients, loss, *sides)
    flops = 2 * rows * dim * (2 * pool + sides[1].shape[0])
    cost = Cost(bytes=2 * (q.nbytes + documents.nbytes), flops=flops)
    check = functools.partial(check_loss, wanted=ours())
    measure(row, ours, cost, peers, start, check, logits_bytes=2 * rows * pool)
    check_part(losses.ours, stored, q, documents)


@COMPARED
@pytest.mark.covers("info_nce_forward", "info_nce_backward")
def test_siglip(compared_with, measure):
    torch_peer = {"torch, logits stored": Peer(losses.siglip_stored)}
    peers, rows = peers_of(compared_with, torch_peer, gpu_peers.SIGLIP), size(65_536, 32)
    sides = embeddings(rows, rows, 768, torch.bfloat16, DEVICE)

    def start(function: Callable) -> Callable:
        return functools.partial(gradients, function, *sides)

    ours = start(losses.siglip)
    cost = Cost(bytes=4 * sides[0].nbytes, flops=6 * rows**2 * 768)
    row = "SigLIP 65,536 x 65,536, d=768, bf16"
    check = functools.partial(check_loss, wanted=ours())
    measure(row, ours, cost, peers, start, check, logits_bytes=2 * rows**2)
    check_part(losses.siglip, losses.siglip_stored, *sides)


@pytest.mark.covers("sparse_scatter")
@pytest.mark.parametrize("kind", ["dense", "CSR"])
def test_sparse_scatter(kind, measure):
    generator = torch.Generator(DEVICE).manual_seed(0)
    on_gpu = {"generator": generator, "device": DEVICE}
    weights = torch.randn(32, 512, **on_gpu).relu().flatten().bfloat16()
    ids = torch.randint(250_002, (32 * 512,), **on_gpu)
    bounds = torch.arange(33, device=DEVICE, dtype=torch.int32) * 512
    options = {"cu_seqlens": bounds, "vocabulary": 250_002 if kind == "dense" else None}
    rows = torch.arange(32, device=DEVICE).repeat_interleave(512)

    def ours():
        return ops.sparse_scatter(weights, ids, **options)

    def theirs():
        out = torch.zeros(32 * 250_002, device=DEVICE, dtype=weights.dtype)
        return out.scatter_reduce_(0, rows * 250_002 + ids, weights, "amax").view(32, -1)

    wanted = theirs()

    def check(found) -> None:
        found = found if isinstance(found, torch.Tensor) else found.dense(250_002)
        assert_close(found, wanted, share=0, what="weights")

    # Dense: 16 MB, mostly zeros, are written.
    written = 2 * 32 * 250_002 if kind == "dense" else 10 * weights.numel()
    cost = Cost(bytes=10 * weights.numel() + written, flops=0)
    row = f"sparse scatter 32x512, V=250,002, {kind}"
    peers = {"torch scatter_reduce, dense": Peer(theirs)}
    measure(row, ours, cost, peers, lambda function: function, check)


@pytest.mark.covers("pool_normalize")
def test_pool_normalize(measure):
    texts = size(64, 2)
    x = torch.randn(texts, 512, 4096, device=DEVICE, dtype=torch.bfloat16)
    mask = torch.ones(texts, 512, device=DEVICE, dtype=torch.int64)

    def ours():
        return ops.pool_normalize(x, attention_mask=mask, pooling="last")

    def theirs():
        return normalize(x[torch.arange(texts, device=DEVICE), mask.sum(1) - 1].float(), dim=1)

    check = functools.partial(assert_close, wanted=theirs(), share=0.01, what="vectors")
    cost = Cost(bytes=mask.nbytes + 2 * texts * 4096 * 2, flops=3 * texts * 4096)
    row = "pool + normalize 64x512x4096, last, bf16"
    peers = {"torch, three kernels": Peer(theirs)}
    measure(row, ours, cost, peers, lambda function: function, check)
