"""The post-norm encoder tower (BERT, RoBERTa, XLM-RoBERTa) on packed tokens."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedfuse.nn.attention import attention
from embedfuse.nn.linear import FusedLinear, is_plain, linear
from embedfuse.packing import Packed

# Bounds the activations of a large batch on the CPU. Speed hardly depends on it: 1,024 to all tokens
# at once differed by at most 5 % (all-MiniLM-L6-v2, 160 long docstrings, 2 cores of an EPYC 9004).
STEP_TOKENS = 2048


@dataclass
class EncoderLayer:
    """The modules of one layer, wherever the model keeps them.

    x = norm1(out(attention(qkv(x))) + x);  x = norm2(down(activation(up(x))) + x), with dropout
    after `out` and `down`.
    """

    block: nn.Module  # the layer as a whole: training flag, gradient checkpointing
    qkv: FusedLinear
    heads: int
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

    def __call__(self, x: Tensor, packed: Packed, plain: bool) -> Tensor:
        query, key, value = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(x, plain))
        dropout = self.attention.dropout.p if self.attention.training else 0.0
        y = attention(query, key, value, packed, scale=self.scale, dropout=dropout)
        x = layer_norm(self.norm1, dense_add(self.out, self.dropout1, y, x, plain))
        y = self.activation(linear(self.up, x, plain))
        return layer_norm(self.norm2, dense_add(self.down, self.dropout2, y, x, plain))


def dense_add(
    dense: nn.Module, dropout: nn.Module, y: Tensor, residual: Tensor, plain: bool
) -> Tensor:
    y = linear(dense, y, plain)
    idle = type(dropout) is nn.Dropout and not dropout.training
    if not idle:
        y = dropout(y)
    # Only our own result is written to, never what somebody else's module returned.
    if plain and idle and type(dense) is nn.Linear and y.dtype == residual.dtype:
        return y.add_(residual)
    return y + residual


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if type(norm) is not nn.LayerNorm:
        return norm(x)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def encode(layers: list[EncoderLayer], x: Tensor, packed: Packed) -> Tensor:
    """x: (tokens, hidden) embeddings -> (tokens, hidden) states after the last layer."""
    plain = is_plain(x)
    if plain and x.is_cpu and packed.tokens > STEP_TOKENS:
        parts = packed.split(STEP_TOKENS)
        states = [
            run(layers, part_x, part, plain)
            for part_x, part in zip(x.split([p.tokens for p in parts]), parts, strict=True)
        ]
        return torch.cat(states)
    return run(layers, x, packed, plain)


def run(layers: list[EncoderLayer], x: Tensor, packed: Packed, plain: bool) -> Tensor:
    for layer in layers:
        step = partial(layer, packed=packed, plain=plain)
        if getattr(layer.block, "gradient_checkpointing", False) and layer.block.training:
            x = layer.block._gradient_checkpointing_func(step, x)
        else:
            x = step(x)
    return x
