"""The pre-norm decoder tower (Mistral, LLaMA, Qwen) on packed tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from embedfuse.nn.attention import attention
from embedfuse.nn.linear import is_plain, linear, linears
from embedfuse.nn.prefixes import Step
from embedfuse.nn.tower import checkpointed, project, steps
from embedfuse.ops.add_rms_norm import OP as ADD_RMS_NORM
from embedfuse.ops.checks import kernel_takes
from embedfuse.ops.rope import OP as ROPE
from embedfuse.ops.rope import rotate
from embedfuse.ops.silu_mul import OP as SILU_MUL
from embedfuse.packing import Packed, one_each


@dataclass
class DecoderLayer:
    """The modules of one layer, wherever the model keeps them.

    x = x + out(attention(qkv(norm1(x))));  x = x + down(activation(gate(n)) up(n)), n = norm2(x).
    Query and key are normalised per head (Qwen3) and rotated. The norms are transformers'
    …RMSNorm: `weight` and `variance_epsilon`.
    """

    index: int
    block: nn.Module  # the layer as a whole: training flag, gradient checkpointing
    norm1: nn.Module
    qkv: tuple[nn.Module, nn.Module, nn.Module]  # of query, key and value
    head_dim: int
    scale: float
    causal: bool
    window: int | None  # keys that a token sees, its own the last; needs causal
    attention: nn.Module  # its training flag
    dropout: float  # of attention weights, in training
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    out: nn.Module
    norm2: nn.Module
    gate_up: tuple[nn.Module, nn.Module]
    activation: nn.Module
    down: nn.Module

    def __call__(
        self,
        y: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        packed: Packed,
        plain: bool,
        rows: Tensor | None = None,
        shared: Step | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The layer's input is y + residual (tokens, hidden), and so is its output.

        Left as two, because the norm that follows adds them. With `rows`, the result for these
        tokens alone (see `decode`). shared: where the tokens are not all of their sequences (`packed`).
        """
        x, residual = add_norm(self.norm1, y, residual, plain)
        y = self.attend(x, cos, sin, packed, plain, rows, shared)
        if rows is not None:
            residual = residual[rows]
        x, residual = add_norm(self.norm2, linear(self.out, y, plain), residual, plain)
        gate, up = linears(self.gate_up, x, plain)
        return linear(self.down, activate(self.activation, gate, up, plain), plain), residual

    def attend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        packed: Packed,
        plain: bool,
        rows: Tensor | None,
        shared: Step | None,
    ) -> Tensor:
        projections = project(self.qkv, x, rows, plain)
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in projections)
        queries, at_query = None if shared is None else shared.queries, (cos, sin)
        if rows is not None:
            queries, at_query = one_each(len(rows), x.device), (cos[rows], sin[rows])
        to_query, to_key, _ = self.qkv
        query = turn(to_query, self.query_norm, query, *at_query, plain)
        key = turn(to_key, self.key_norm, key, cos, sin, plain)
        if shared is not None:
            key, value = shared.unfold(self.index, key, value)
        return attention(
            query,
            key,
            value,
            packed,
            scale=self.scale,
            dropout=self.dropout if self.attention.training else 0.0,
            queries=queries,
            causal=self.causal,
            window=self.window,
        )


def turn(
    module: nn.Module, norm: nn.Module | None, x: Tensor, cos: Tensor, sin: Tensor, plain: bool
) -> Tensor:
    """module's result x (tokens, heads, head_dim), normalised and rotated, in place where it is ours."""
    ours = type(module) is nn.Linear
    if norm is not None:
        x, ours = add_norm(norm, x, None, plain)[0], True
    if not (plain and kernel_takes(ROPE, x, cos, sin)):
        return rotate(x, cos, sin)
    x = x if ours else x.clone()
    ROPE(x, cos, sin)
    return x


def add_norm(
    norm: nn.Module, y: Tensor, residual: Tensor | None, plain: bool
) -> tuple[Tensor, Tensor]:
    """norm(y + residual) and the sum; residual: None adds nothing."""
    if plain and kernel_takes(ADD_RMS_NORM, y, residual, norm.weight):
        normed, summed = ADD_RMS_NORM(y, residual, norm.weight, norm.variance_epsilon)
        return normed, y if residual is None else summed
    summed = y if residual is None else residual + y
    return norm(summed), summed


def activate(activation: nn.Module, gate: Tensor, up: Tensor, plain: bool) -> Tensor:
    """activation(gate) up"""
    if plain and is_silu(activation) and kernel_takes(SILU_MUL, gate, up):
        return SILU_MUL(gate, up)
    return activation(gate) * up


def is_silu(activation: nn.Module) -> bool:
    from transformers.activations import SiLUActivation  # loaded already by whoever has a model

    return type(activation) in (nn.SiLU, SiLUActivation)


def decode(
    layers: list[DecoderLayer],
    norm: nn.Module,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    packed: Packed,
    rows: Tensor | None = None,
    shared: Iterable[Step] | None = None,
) -> Tensor:
    """x: (tokens, hidden) embeddings -> norm of the (tokens, hidden) states after the last layer.

    cos, sin: (tokens, head_dim / 2), as in ops.rope, of each token's position.
    rows: (batch,) int64, the last token of each sequence, where only their states are wanted (last
    because attention counts query rows from the end). The last layer then computes keys and values
    for all tokens and the rest for these; returns (batch, hidden).
    shared: the steps that run prefixes shared by sequences once; None: every token runs.
    """
    plain = is_plain(x)
    if shared is not None:
        return decode_shared(layers, norm, x, cos, sin, rows, shared)
    states = [
        run(layers, norm, x[tokens], cos[tokens], sin[tokens], part, plain, of_part)
        for tokens, part, of_part in steps(x, packed, rows)
    ]
    return states[0] if len(states) == 1 else torch.cat(states)


def decode_shared(
    layers: list[DecoderLayer],
    norm: nn.Module,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    shared: Iterable[Step],
) -> Tensor:
    out = None
    for step in shared:
        of_step = (t[step.tokens] for t in (x, cos, sin))
        wanted = None if rows is None else step.last
        states = run(layers, norm, *of_step, step.keys, True, wanted, step)
        if out is None:  # a norm in fp32 gives fp32 states
            out = states.new_empty(len(x) if rows is None else len(rows), x.shape[1])
        if rows is None:
            out[step.places] = states[step.source]
        else:
            out[step.sequences] = states
    return out


def run(
    layers: list[DecoderLayer],
    norm: nn.Module,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    packed: Packed,
    plain: bool,
    rows: Tensor | None,
    shared: Step | None = None,
) -> Tensor:
    state = x, None
    for layer in layers:
        wanted = rows if layer is layers[-1] else None
        step = partial(
            layer, cos=cos, sin=sin, packed=packed, plain=plain, rows=wanted, shared=shared
        )
        state = checkpointed(layer.block, step, *state)
    if rows is not None and not layers:
        state = x[rows], None
    return add_norm(norm, *state, plain)[0]
