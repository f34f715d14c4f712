"""The post-norm encoder tower (BERT, RoBERTa, XLM-RoBERTa) on packed tokens."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedfuse.nn.attention import attention
from embedfuse.nn.linear import is_plain, linear
from embedfuse.nn.tower import checkpointed, project, steps
from embedfuse.ops.add_layer_norm import OP as ADD_LAYER_NORM
from embedfuse.ops.checks import kernel_takes
from embedfuse.packing import Packed, one_each


@dataclass
class EncoderLayer:
    """The modules of one layer, wherever the model keeps them.

    x = norm1(out(attention(qkv(x))) + x);  x = norm2(down(activation(up(x))) + x), with dropout
    after `out` and `down`.
    """

    block: nn.Module  # the layer as a whole: training flag, gradient checkpointing
    qkv: tuple[nn.Module, nn.Module, nn.Module]  # of query, key and value
    head_dim: int
    scale: float
    attention: nn.Module  # its training flag and its dropout's rate
    out: nn.Module
    dropout1: nn.Module
    norm1: nn.Module
    up: nn.Module
    activation: nn.Module
    down: nn.Module
    dropout2: nn.Module
    norm2: nn.Module

    def __call__(
        self, x: Tensor, packed: Packed, plain: bool, rows: Tensor | None = None
    ) -> Tensor:
        """x: (tokens, hidden). With `rows`, the result for these tokens alone (see `encode`)."""
        projections = project(self.qkv, x, rows, plain)
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in projections)
        queries = None
        if rows is not None:
            queries = one_each(len(rows), x.device)
            x = x[rows]
        dropout = self.attention.dropout.p if self.attention.training else 0.0
        y = attention(query, key, value, packed, scale=self.scale, dropout=dropout, queries=queries)
        x = add_norm(self.norm1, self.dropout1, linear(self.out, y, plain), x, plain)
        y = activate(self.activation, self.up, x, plain)
        return add_norm(self.norm2, self.dropout2, linear(self.down, y, plain), x, plain)


def activate(activation: nn.Module, up: nn.Module, x: Tensor, plain: bool) -> Tensor:
    y = linear(up, x, plain)
    # Only our own result is written to, never what somebody else's module returned.
    if plain and type(up) is nn.Linear and is_exact_gelu(activation):
        return torch.ops.aten.gelu_(y)
    return activation(y)


def is_exact_gelu(activation: nn.Module) -> bool:
    from transformers.activations import GELUActivation  # loaded already by whoever has a model

    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    return type(activation) is GELUActivation and activation.act is F.gelu


def add_norm(
    norm: nn.Module, dropout: nn.Module, y: Tensor, residual: Tensor, plain: bool
) -> Tensor:
    """norm(dropout(y) + residual)"""
    if not (type(dropout) is nn.Dropout and not dropout.training):
        y = dropout(y)
    if plain and norm_takes(norm, y, residual):
        return ADD_LAYER_NORM(y, residual, norm.weight, norm.bias, norm.eps)
    return layer_norm(norm, y + residual)


def norm_takes(norm: nn.Module, y: Tensor, residual: Tensor) -> bool:
    if type(norm) is not nn.LayerNorm or norm.weight is None or y.shape != residual.shape:
        return False
    return norm.weight.shape == y.shape[1:] and kernel_takes(
        ADD_LAYER_NORM, y, residual, norm.weight, norm.bias
    )


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if type(norm) is not nn.LayerNorm:
        return norm(x)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def encode(
    layers: list[EncoderLayer], x: Tensor, packed: Packed, rows: Tensor | None = None
) -> Tensor:
    """x: (tokens, hidden) embeddings -> (tokens, hidden) states after the last layer.

    rows: (batch,) int64, one token of each sequence in turn (its first or its last, say), where only
    their states are wanted. The last layer then computes keys and values for all tokens and the rest
    for these; returns (batch, hidden).
    """
    plain = is_plain(x)
    states = [
        run(layers, x[tokens], part, plain, of_part)
        for tokens, part, of_part in steps(x, packed, rows)
    ]
    return states[0] if len(states) == 1 else torch.cat(states)


def run(
    layers: list[EncoderLayer], x: Tensor, packed: Packed, plain: bool, rows: Tensor | None
) -> Tensor:
    for layer in layers:
        wanted = rows if layer is layers[-1] else None
        x = checkpointed(layer.block, partial(layer, packed=packed, plain=plain, rows=wanted), x)
    return x if layers or rows is None else x[rows]
