"""The kernels' contracts: what each computes, on which shapes, with which gradient."""

from embedfuse.ops.pool_normalize import pool_normalize
from embedfuse.ops.skinny_linear import skinny_linear

__all__ = ["pool_normalize", "skinny_linear"]
