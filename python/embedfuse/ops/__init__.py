"""The kernels' contracts: what each computes, on which shapes, with which gradient."""

import warnings

from embedfuse.ops.add_layer_norm import add_layer_norm
from embedfuse.ops.add_rms_norm import add_rms_norm
from embedfuse.ops.deprecated import DEPRECATED
from embedfuse.ops.info_nce.candidates import FalseNegatives, Rows
from embedfuse.ops.info_nce.distributed import AllGather, Ring
from embedfuse.ops.info_nce.loss import InfoNCEOutput, info_nce
from embedfuse.ops.info_nce.matryoshka.widths import Matryoshka
from embedfuse.ops.lexical.csr import Csr
from embedfuse.ops.lexical.scores import lexical_scores
from embedfuse.ops.lexical.sparse_scatter import sparse_scatter
from embedfuse.ops.lexical.weights import lexical_weights
from embedfuse.ops.linear import linear
from embedfuse.ops.maxsim.int8 import Int8, quantize_int8
from embedfuse.ops.maxsim.scores import maxsim, maxsim_packed, maxsim_rerank
from embedfuse.ops.pool_normalize import pool_normalize
from embedfuse.ops.rope import rope, rope_
from embedfuse.ops.segment_sum import segment_sum
from embedfuse.ops.silu_mul import silu_mul
from embedfuse.ops.varlen_attention import varlen_attention

__all__ = [
    "AllGather",
    "Csr",
    "FalseNegatives",
    "InfoNCEOutput",
    "Int8",
    "Matryoshka",
    "Ring",
    "Rows",
    "add_layer_norm",
    "add_rms_norm",
    "info_nce",
    "lexical_scores",
    "lexical_weights",
    "linear",
    "maxsim",
    "maxsim_packed",
    "maxsim_rerank",
    "pool_normalize",
    "quantize_int8",
    "rope",
    "rope_",
    "segment_sum",
    "silu_mul",
    "sparse_scatter",
    "varlen_attention",
]

# Modules of 0.1 are found in old_paths/, until 0.3.
__path__ += [f"{folder}/old_paths" for folder in __path__]


def __getattr__(name: str):
    if name not in DEPRECATED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value, instead = DEPRECATED[name]
    warnings.warn(
        f"embedfuse.ops.{name} is deprecated and will be removed in version 0.3; use {instead}",
        DeprecationWarning,
        stacklevel=2,
    )
    return value
