"""The post-norm encoder tower (BERT, RoBERTa, XLM-RoBERTa) on packed tokens."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedfuse.nn.attention import attention
from embedfuse.nn.linear import FusedLinear, is_plain, linear
from embedfuse.packing import Packed

# On the CPU, more tokens at once only push the activations out of the cache
# (`make bench`: benchmarks/test_models.py, all-MiniLM-L6-v2 on 2 cores of an EPYC 9004).
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
    attention_dropout: nn.Dropout
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
        dropout = self.attention_dropout.p if self.attention_dropout.training else 0.0
        y = attention(query, key, value, packed, scale=self.scale, dropout=dropout)
        x = add_norm(self.norm1, self.dropout1, linear(self.out, y, plain), x, plain)
        y = linear(self.down, self.activation(linear(self.up, x, plain)), plain)
        return add_norm(self.norm2, self.dropout2, y, x, plain)


def add_norm(norm: nn.Module, dropout: nn.Module, y: Tensor, x: Tensor, plain: bool) -> Tensor:
    if dropout.training:
        y = dropout(y)
    y = y.add_(x) if plain and y.dtype == x.dtype else y + x
    return layer_norm(norm, y)


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
