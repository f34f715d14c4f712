"""The kernels' rows of benchmarks/targets.py on a GPU, beside plain torch and the peers that are installed.

Each row is checked against torch before it is timed: by events, with what it reads flushed from the caches,
ours and a peer in turn. GB/s and TFLOP/s count what the call must move and compute at least, percent of the
ceilings measured in the same run. The memory is what the call took beyond its inputs.
"""

import statistics
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from benchmarks.conftest import DEVICE
from benchmarks.losses import both_passes, embeddings, stored
from benchmarks.peaks import cuda_seconds
from benchmarks.targets import TARGETS
from embedfuse import ops
from embedfuse.registry import Cost

ROUNDS = 20
TEMPERATURE = 0.02

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def measure(benchmark, row: str, ours: Callable, cost: Cost, peaks, flush, theirs=None, **info):
    """Times in turn in five groups of calls. theirs: a name and a call, or nothing."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours()
    extra = torch.cuda.max_memory_allocated() - before
    once = cuda_seconds(ours, 3)[0]
    repeats = max(1, min(ROUNDS, int(0.5 / once))) if once < 1 else 1
    calls = [ours, *([theirs[1]] if theirs else [])]
    times = [[] for _ in calls]
    for _ in range(5):
        for call, found in zip(calls, times, strict=True):
            found += cuda_seconds(call, repeats, before=flush)
    seconds = [statistics.median(found) for found in times]
    scale = {"µs": 1e6, "ms": 1e3}[TARGETS[row].unit]
    benchmark.extra_info.update(
        kernel=row,
        seconds=seconds[0],
        rows={row: {"value": seconds[0] * scale, "unit": TARGETS[row].unit}},
        gb_per_s=cost.bytes / seconds[0] / 1e9,
        tflop_per_s=cost.flops / seconds[0] / 1e12,
        percent_of_peak=100 * peaks.floor(cost, torch.bfloat16) / seconds[0],
        peak_gb_per_s=peaks.bandwidth / 1e9,
        peak_tflop_per_s=peaks.flops[torch.bfloat16] / 1e12,
        bytes=extra,
        peer_seconds=seconds[1] if theirs else None,
        kernel_peer=theirs[0] if theirs else "none is installed",
        **info,
    )
    benchmark.pedantic(lambda: None)


def texts(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    return normalize(x, dim=-1)


def products(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """(queries, documents) scores, all similarities stored."""
    return torch.einsum("aid,bjd->abij", q, d).amax(3).float().sum(2)


def check(found: torch.Tensor, wanted: torch.Tensor, share: float = 0.01):
    """bf16's rounding of the products: a share of the largest score."""
    assert (found.double() - wanted.double()).abs().max() <= share * wanted.abs().max()


@pytest.mark.covers("maxsim")
@pytest.mark.parametrize(
    ("documents", "dim", "dtype"),
    [(1000, 128, "bf16"), (10_000, 128, "bf16"), (10_000, 128, "int8"), (1000, 1024, "bf16")],
)
def test_maxsim(documents, dim, dtype, benchmark, peaks, flush):
    q, d = texts(1, 32, dim), texts(documents, 300, dim)
    own = ops.quantize_int8(d) if dtype == "int8" else d
    row = f"MaxSim 1x32, {documents:,}x300, d={dim}, {dtype}"
    check(ops.maxsim(q, own), products(q, d))
    read = d.numel() * (1 if dtype == "int8" else 2) + q.nbytes + 4 * documents
    read += 4 * d.shape[0] * d.shape[1] * (dtype == "int8")  # a scale for each token
    cost = Cost(bytes=read, flops=2 * 32 * 300 * documents * dim)
    theirs = "torch einsum, bf16", lambda: products(q, d)
    measure(benchmark, row, lambda: ops.maxsim(q, own), cost, peaks, flush, theirs)


@pytest.mark.covers("maxsim", "segment_sum")
@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
def test_all_pairs(passes, benchmark, peaks, flush):
    backward = passes != "forward"
    q, d = (x.requires_grad_(backward) for x in (texts(128, 32, 128), texts(128, 300, 128)))
    weights = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)).cuda()

    def run(function: Callable, dtype: torch.dtype = torch.bfloat16) -> Callable:
        def call():
            scores = function(q.to(dtype), d.to(dtype))
            return torch.autograd.grad((scores * weights).sum(), (q, d)) if backward else [scores]

        return call

    ours, theirs = run(ops.maxsim), run(products)
    # Rounded to bf16, products are often equal, and another token than in fp32 gets the gradient.
    exact = run(products, torch.float32)
    for a, b in zip(ours(), exact(), strict=True):
        assert cosine_similarity(a.double().flatten(), b.double().flatten(), 0) > 0.999
    # Backward: a sum over the tokens that gave a maximum, which reads each side once more.
    flops = 2 * 128 * 32 * 128 * 300 * 128
    cost = Cost(bytes=(3 if backward else 1) * (q.nbytes + d.nbytes), flops=flops)
    row = f"MaxSim 128x32, 128x300, d=128, bf16, {passes}"
    measure(benchmark, row, ours, cost, peaks, flush, ("torch einsum", theirs))


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
def test_info_nce(rows, pool, dim, kind, benchmark, peaks, flush):
    q, documents = embeddings(rows, pool, dim, torch.bfloat16, "cuda")
    positives = documents[:rows].detach().clone().requires_grad_()
    bank = documents[rows:].detach()

    def loss(q, documents, **options):
        call = {"temperature": TEMPERATURE, **options}
        return ops.info_nce(q, documents, **call).loss.mean()

    check_info_nce(q, documents, loss)
    if kind:  # the documents beyond the positives get no gradient
        sides, calls = (q, positives), lambda q, p: loss(q, p, bank=bank)
    else:
        sides, calls = (q, documents), loss
    with_gradient = sides[1].shape[0]
    flops = 2 * rows * dim * (2 * pool + with_gradient)
    read = 2 * (q.nbytes + documents.nbytes)
    row = f"InfoNCE {rows:,} x {pool:,}, d={dim}, bf16{kind}"
    logits = rows * pool * 2
    theirs = None
    torch.cuda.empty_cache()
    # Three at once in fp32, and some room: logits, logarithms and gradients.
    if not kind and 7 * logits < torch.cuda.mem_get_info()[0]:
        theirs = "torch, logits stored", lambda: both_passes(stored, q, documents)
    info = {"logits_bytes": logits}
    cost = Cost(bytes=read, flops=flops)
    run = lambda: both_passes(calls, *sides)  # noqa: E731
    measure(benchmark, row, run, cost, peaks, flush, theirs, **info)


def check_info_nce(q, documents, loss) -> None:
    """On a part that torch can store."""
    part = [x.detach()[:2048].clone().requires_grad_() for x in (q, documents)]
    found = [(both_passes(f, *part), *(x.grad for x in part)) for f in (loss, stored)]
    for got, wanted in zip(*found, strict=True):
        check(got, wanted, 0.05)


@pytest.mark.covers("sparse_scatter")
@pytest.mark.parametrize("kind", ["dense", "CSR"])
def test_sparse_scatter(kind, benchmark, peaks, flush):
    generator = torch.Generator("cuda").manual_seed(0)
    on_gpu = {"generator": generator, "device": "cuda"}
    weights = torch.randn(32, 512, **on_gpu).relu().flatten().bfloat16()
    ids = torch.randint(250_002, (32 * 512,), **on_gpu)
    bounds = torch.arange(33, device="cuda", dtype=torch.int32) * 512
    options = {"cu_seqlens": bounds, "vocabulary": 250_002 if kind == "dense" else None}
    rows = torch.arange(32, device="cuda").repeat_interleave(512)

    def ours():
        return ops.sparse_scatter(weights, ids, **options)

    def theirs():
        out = torch.zeros(32 * 250_002, device="cuda", dtype=weights.dtype)
        return out.scatter_reduce_(0, rows * 250_002 + ids, weights, "amax").view(32, -1)

    found = ours()
    found = found if kind == "dense" else found.dense(250_002)
    assert torch.equal(found, theirs())
    # Dense: 16 MB of mostly zeros are written.
    written = 2 * 32 * 250_002 if kind == "dense" else 10 * weights.numel()
    cost = Cost(bytes=10 * weights.numel() + written, flops=0)
    row = f"sparse scatter 32x512, V=250,002, {kind}"
    measure(benchmark, row, ours, cost, peaks, flush, ("torch scatter_reduce, dense", theirs))


@pytest.mark.covers("pool_normalize")
def test_pool_normalize(benchmark, peaks, flush):
    x = torch.randn(64, 512, 4096, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(64, 512, device="cuda", dtype=torch.int64)

    def ours():
        return ops.pool_normalize(x, attention_mask=mask, pooling="last")

    def theirs():
        return normalize(x[torch.arange(64, device="cuda"), mask.sum(1) - 1].float(), dim=1)

    check(ours(), theirs())
    cost = Cost(bytes=mask.nbytes + 2 * 64 * 4096 * 2, flops=3 * 64 * 4096)
    row = "pool + normalize 64x512x4096, last, bf16"
    measure(benchmark, row, ours, cost, peaks, flush, ("torch, three kernels", theirs))
