"""What the kernels' rows stand beside on a GPU, and how calls are timed in turn.

A peer is used where its packages are installed. One that is not, that raises, or whose values are not the
row's stands in the row with the reason. Peers get their arguments in the form that serves them best: what
depends on the documents alone is made before the time starts.
"""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from benchmarks.harness import ledger
from benchmarks.harness.peaks import cuda_seconds
from benchmarks.peers import losses

GROUPS = 5
ROUNDS = 20
SECONDS = 0.5  # of a group; a call that takes longer is timed once


@dataclass(frozen=True)
class Peer:
    """function: what a row's `start` makes a call without arguments of. packages: as pip knows them, the
    peer's own first."""

    function: Callable
    packages: tuple[str, ...] = ()


def late_interaction_kernels(q: Tensor, d: Tensor) -> Callable:
    from late_interaction_kernels import maxsim

    return lambda: maxsim(q, d)


def late_interaction_kernels_fp8(q: Tensor, d: Tensor) -> Callable:
    from late_interaction_kernels.fp8 import maxsim_inference_fp8, quantize_fp8_per_token

    documents, scale = quantize_fp8_per_token(d)

    def call() -> Tensor:
        query, query_scale = quantize_fp8_per_token(q)
        return maxsim_inference_fp8(query, documents, scale_Q=query_scale, scale_D=scale)

    return call


def flash_maxsim(q: Tensor, d: Tensor) -> Callable:
    from flash_maxsim import flash_maxsim_batched, flash_maxsim_batched_train

    function = flash_maxsim_batched_train if d.requires_grad else flash_maxsim_batched
    return functools.partial(function, q, d, doc_lengths=lengths(d))


def flash_maxsim_int8(q: Tensor, d: Tensor) -> Callable:
    from flash_maxsim import flash_maxsim_int8_symmetric, quantize_int8_symmetric

    documents = *quantize_int8_symmetric(d), lengths(d)
    return lambda: flash_maxsim_int8_symmetric(q[0], *documents)[None]


def flash_maxsim_int8x8(q: Tensor, d: Tensor) -> Callable:
    from flash_maxsim import flash_maxsim_int8x8, quantize_int8_symmetric

    documents, tokens = quantize_int8_symmetric(d), lengths(d)
    return lambda: flash_maxsim_int8x8(q[0], *documents, doc_lengths=tokens)[None]


def lengths(d: Tensor) -> Tensor:
    return torch.full(d.shape[:1], d.shape[1], dtype=torch.int32, device=d.device)


def liger_scaled(q: Tensor, pool: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    arguments = q, pool, losses.diagonal(q), losses.TEMPERATURE
    return LigerFusedLinearScaledCrossEntropyFunction.apply(*arguments).mean()


def memeff(q: Tensor, pool: Tensor) -> Tensor:
    """Its loss of Qwen3-Embedding, which is InfoNCE where no document counts as a false negative."""
    from memeff import MemoryEfficientQwen3Loss

    settings = {"margin": 4.0, "normalized_inputs": True, "stable": False}
    return MemoryEfficientQwen3Loss(losses.TEMPERATURE, **settings)(q, pool)


LIK = ("late-interaction-kernels",)
CCE = ("cut-cross-entropy",)
MAXSIM = {
    "late-interaction-kernels": Peer(late_interaction_kernels, LIK),
    "flash-maxsim": Peer(flash_maxsim, ("flash-maxsim",)),
}
MAXSIM_INT8 = {
    "late-interaction-kernels, fp8": Peer(late_interaction_kernels_fp8, LIK),
    "flash-maxsim, int8 documents": Peer(flash_maxsim_int8, ("flash-maxsim",)),
    "flash-maxsim, int8 on both sides": Peer(flash_maxsim_int8x8, ("flash-maxsim",)),
}
INFO_NCE = {
    # On Hopper what it computes is written in CuTe.
    "Liger, scaled": Peer(liger_scaled, ("liger-kernel", "nvidia-cutlass-dsl")),
    "Liger": Peer(losses.liger, ("liger-kernel",)),
    # By default it leaves out gradients of small weights.
    "cut-cross-entropy": Peer(losses.cut_cross_entropy, CCE),
    "cut-cross-entropy, filter_eps=None": Peer(
        functools.partial(losses.cut_cross_entropy, filter_eps=None), CCE
    ),
    "Inf-CL": Peer(losses.inf_cl, ("inf-cl",)),
}
INFO_NCE_SQUARE = {**INFO_NCE, "memeff": Peer(memeff, ("memeff",))}
SIGLIP = {"siglip-kernel": Peer(losses.siglip_kernel, ("siglip-kernel",))}


def ready(peers: dict[str, Peer], start: Callable, check: Callable) -> tuple[dict, dict]:
    """Calls of the peers whose values pass `check`, by name; and an entry of the row for every peer."""
    calls, entries = {}, {}
    for name, peer in peers.items():
        try:
            versions = [version(package) for package in peer.packages]
            call = start(peer.function)
            check(call())  # it compiles, too
        except PackageNotFoundError as error:
            entries[name] = {"reason": f"not installed: {error.name}"}
        except Exception as error:  # whatever a peer raises: the others are measured
            if lost := ledger.lost_context():
                raise RuntimeError(f"{name} lost the GPU's context: {lost}") from error
            entries[name] = {"reason": told(error)}
        else:
            calls[name], entries[name] = call, {"version": " ".join(versions[:1])}
    return calls, entries


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def in_turn(calls: dict[str, Callable], flush: Callable) -> dict[str, dict]:
    """Median seconds of each call, and the bytes that it took beyond what was there."""
    found = {name: first(call, flush) for name, call in calls.items()}
    times = {name: [entry["seconds"]] for name, entry in found.items()}
    for _ in range(GROUPS):
        for name, call in calls.items():
            if (once := times[name][0]) < SECONDS:
                repeats = max(1, min(ROUNDS, int(SECONDS / once)))
                times[name] += cuda_seconds(call, repeats, before=flush)
    return {name: found[name] | {"seconds": statistics.median(times[name])} for name in calls}


def first(call: Callable, flush: Callable) -> dict:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = cuda_seconds(call, 1, before=flush)[0]
    return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated() - before}


def agree(found: Tensor, wanted: Tensor, least: float, what: str) -> None:
    """AssertionError where the two point elsewhere."""
    a, b = (x.detach().float().flatten() for x in (found, wanted))
    cosine = torch.nn.functional.cosine_similarity(a, b, 0).item()
    if not cosine >= least:
        raise AssertionError(f"other values: {what}, cosine {cosine:.4f} below {least}")


def close(found: Tensor, wanted: Tensor, share: float, what: str) -> None:
    """AssertionError where they differ by more than such a share of the largest value."""
    error = ((found.double() - wanted.double()).abs().max() / wanted.abs().max()).item()
    if not error <= share:
        raise AssertionError(
            f"other values: {what}, error {error:.4f} of the largest, above {share}"
        )
