"""The functions of other libraries that kernels are compared with on a GPU.

Each gets its arguments in the fastest form: what depends only on the documents is computed before the time
starts.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from benchmarks.peers import losses


@dataclass(frozen=True)
class Peer:
    """A function of another library.

    Attributes:
        function: Takes what the row's `start` passes; from it `start` makes a call without arguments.
        packages: Names on PyPI; the version of the first is reported.
    """

    function: Callable
    packages: tuple[str, ...] = ()

    def is_installed(self) -> bool:
        try:
            return bool([version(package) for package in self.packages])
        except PackageNotFoundError:
            return False


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
    """The loss of Qwen3-Embedding, which is InfoNCE where no document counts as a false negative."""
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
    # Written in CuTe for Hopper.
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
