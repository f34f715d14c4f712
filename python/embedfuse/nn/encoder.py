"""The post-norm encoder tower (BERT, RoBERTa, XLM-RoBERTa) on packed tokens."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedfuse.nn.attention import attention
from embedfuse.nn.linear import is_inference, linear, linear_gelu
from embedfuse.nn.program import NONE, Columns, Program, Unfit, columns_of
from embedfuse.nn.tower import checkpointed, project, split_into_steps
from embedfuse.ops.add_layer_norm import OP as ADD_LAYER_NORM
from embedfuse.ops.checks import kernel_takes
from embedfuse.packing import Packed, one_each


@dataclass
class EncoderLayer:
    """The modules of one layer, whatever their names in the model.

    x = norm1(out(attention(qkv(x))) + x);  x = norm2(down(activation(up(x))) + x), with dropout
    after `out` and `down`.
    """

    block: nn.Module  # the whole layer, read for its training flag and gradient checkpointing
    qkv: tuple[nn.Module, nn.Module, nn.Module]  # of query, key and value
    head_dim: int
    scale: float
    attention: nn.Module  # read for its training flag and dropout rate
    out: nn.Module
    dropout1: nn.Module
    norm1: nn.Module
    up: nn.Module
    activation: nn.Module
    down: nn.Module
    dropout2: nn.Module
    norm2: nn.Module

    def __call__(
        self, x: Tensor, packed: Packed, inference: bool, rows: Tensor | None = None
    ) -> Tensor:
        """The layer on x (tokens, hidden); if `rows` is given, its output for those tokens only.

        record() lists the same calls.
        """
        projections = project(self.qkv, x, rows, inference)
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in projections)
        queries = None
        if rows is not None:
            queries = one_each(len(rows), x.device)
            x = x[rows]
        dropout = self.attention.dropout.p if self.attention.training else 0.0
        y = attention(query, key, value, packed, scale=self.scale, dropout=dropout, queries=queries)
        x = add_norm(self.norm1, self.dropout1, linear(self.out, y, inference), x, inference)
        y = activate(self.activation, self.up, x, inference)
        return add_norm(self.norm2, self.dropout2, linear(self.down, y, inference), x, inference)

    def record(self, program: Program, x: Columns, out: Columns, at: "EncoderBuffers") -> None:
        """The calls of __call__ in inference, with out for all rows or for the picked ones."""
        for module in (self.block, self.attention, self.dropout1, self.dropout2):
            program.reads(module, training=False)
        for dropout in (self.dropout1, self.dropout2):
            is_dropout(dropout)
        if at.picked is None:
            program.linear(self.qkv, x, at.qkv)
        else:
            program.pick(x, at.picked)
            program.linear(self.qkv[:1], at.picked, at.query)
            program.linear(self.qkv[1:], x, at.qkv)
            x = at.picked
        heads = at.query, at.key, at.value
        program.attention(self.qkv, self.head_dim, heads, at.context, scale=self.scale)
        program.linear([self.out], at.context, at.projected)
        program.add_layer_norm(self.norm1, at.projected, x, at.normed)
        reads_exact_gelu(program, self.activation)
        program.linear([self.up], at.normed, at.inner, gelu=True)
        program.linear([self.down], at.inner, at.projected)
        program.add_layer_norm(self.norm2, at.projected, at.normed, out)


@dataclass
class EncoderBuffers:
    """What a layer keeps in a program, of all rows or of the picked ones."""

    picked: Columns | None  # the layer's input
    query: Columns
    key: Columns
    value: Columns
    qkv: Columns  # all three, or key and value
    context: Columns  # attention's result
    projected: Columns
    normed: Columns
    inner: Columns

    @classmethod
    def of(
        cls, program: Program, layer: EncoderLayer, per_sequence: bool, over: Columns = NONE
    ) -> "EncoderBuffers":
        width, hidden, inner = map(columns_of, (layer.qkv[0], layer.out, layer.up))
        picked = query = None
        if per_sequence:
            picked = program.buffer(hidden, per_sequence=True)
            query = program.buffer(width, per_sequence=True)
        qkv = program.buffer((2 if per_sequence else 3) * width, over=over)
        parts = [(qkv[0], i * width) for i in range(3)]
        query, key, value = (query, *parts[:2]) if per_sequence else parts
        return cls(
            picked,
            query,
            key,
            value,
            qkv,
            program.buffer(width, per_sequence=per_sequence),
            program.buffer(hidden, per_sequence=per_sequence),
            program.buffer(hidden, per_sequence=per_sequence),
            program.buffer(inner, per_sequence=per_sequence, over=NONE if per_sequence else qkv),
        )


@dataclass
class EncoderEmbeddings:
    """The modules before the first layer: norm(words + types + positions), with dropout.

    padding_idx: the id from whose number positions count, leaving it out (RoBERTa); None for places (BERT).
    """

    words: nn.Module
    types: nn.Module
    positions: nn.Module
    norm: nn.Module
    dropout: nn.Module
    padding_idx: int | None

    def record(self, program: Program, at: "EncoderBuffers", out: Columns) -> None:
        program.reads(self.dropout, training=False)
        is_dropout(self.dropout)
        hidden = program.width
        tables = [program.table(m, hidden) for m in (self.words, self.types, self.positions)]
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        program.calls.embed(*tables, padding_idx, at.projected, at.normed)
        program.add_layer_norm(self.norm, at.projected, at.normed, out)


def record(
    embeddings: EncoderEmbeddings, layers: list[EncoderLayer], program: Program, picked: bool
) -> None:
    """The calls from token ids to the states of all tokens, or of the picked ones."""
    if not layers:
        raise Unfit("there is no layer")
    program.width = hidden = columns_of(layers[0].out)
    x = program.buffer(hidden)
    out = program.buffer(hidden, per_sequence=picked, external=True)
    at = EncoderBuffers.of(program, layers[0], per_sequence=False)
    embeddings.record(program, at, x)
    for layer in layers[:-1]:
        layer.record(program, x, x, at)
    if picked:
        at = EncoderBuffers.of(program, layers[-1], per_sequence=True, over=at.qkv)
    layers[-1].record(program, x, out, at)


def activate(activation: nn.Module, up: nn.Module, x: Tensor, inference: bool) -> Tensor:
    if inference and type(up) is nn.Linear and is_exact_gelu(activation):
        return linear_gelu(up, x)
    return activation(linear(up, x, inference))


def is_exact_gelu(activation: nn.Module) -> bool:
    from transformers.activations import GELUActivation  # already imported by any model

    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    return type(activation) is GELUActivation and activation.act is F.gelu


def is_dropout(module: nn.Module) -> None:
    """Unfit if it is another module, which may compute something in inference too."""
    if type(module) is not nn.Dropout:
        raise Unfit(f"a dropout is a {type(module).__name__}")


def reads_exact_gelu(program: Program, activation: nn.Module) -> None:
    if not is_exact_gelu(activation):
        raise Unfit(f"the activation is a {type(activation).__name__}, not exact GELU")
    setting = {"approximate": "none"} if type(activation) is nn.GELU else {"act": F.gelu}
    program.reads(activation, **setting)


def add_norm(
    norm: nn.Module, dropout: nn.Module, y: Tensor, residual: Tensor, inference: bool
) -> Tensor:
    """norm(dropout(y) + residual)"""
    if not (type(dropout) is nn.Dropout and not dropout.training):
        y = dropout(y)
    return norm_of_sum(norm, y, residual, inference)


def norm_of_sum(norm: nn.Module, y: Tensor, residual: Tensor, inference: bool) -> Tensor:
    """norm(y + residual)"""
    if inference and norm_takes(norm, y, residual):
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
    """Hidden states after the last layer, op by op.

    Args:
        layers: the layers, first to last.
        x: (tokens, hidden) embeddings.
        packed: the sequences of x.
        rows: (batch,), one token of each sequence in order (its first or last, for example), if
            only their states are needed. The last layer then computes keys and values for all tokens and
            everything else for these.

    Returns:
        (tokens, hidden), or (batch, hidden) if `rows` is given.
    """
    inference = is_inference(x)
    states = [
        encode_step(layers, x[tokens], step, inference, step_rows)
        for tokens, step, step_rows in split_into_steps(x, packed, rows)
    ]
    return states[0] if len(states) == 1 else torch.cat(states)


def encode_step(
    layers: list[EncoderLayer], x: Tensor, packed: Packed, inference: bool, rows: Tensor | None
) -> Tensor:
    for layer in layers:
        layer_rows = rows if layer is layers[-1] else None
        call = partial(layer, packed=packed, inference=inference, rows=layer_rows)
        x = checkpointed(layer.block, call, x)
    return x if layers or rows is None else x[rows]
