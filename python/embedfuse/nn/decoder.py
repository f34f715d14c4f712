"""The pre-norm decoder tower (Mistral, LLaMA, Qwen) on packed tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from embedfuse.nn.attention import attention
from embedfuse.nn.decoder_buffers import DecoderBuffers
from embedfuse.nn.linear import is_inference, linear, linears
from embedfuse.nn.prefixes import Step
from embedfuse.nn.program import NONE, Columns, Program, Unfit, columns_of
from embedfuse.nn.programs import Programs
from embedfuse.nn.tower import checkpointed, project, split_into_steps
from embedfuse.ops.add_rms_norm import OP as ADD_RMS_NORM
from embedfuse.ops.checks import kernel_takes
from embedfuse.ops.rope import OP as ROPE
from embedfuse.ops.rope import rotate
from embedfuse.ops.silu_mul import OP as SILU_MUL
from embedfuse.packing import Packed, one_each


@dataclass
class DecoderLayer:
    """The modules of one layer, whatever their names in the model.

    x = x + out(attention(qkv(norm1(x))));  x = x + down(activation(gate(n)) up(n)), n = norm2(x).
    Query and key are normalised per head (Qwen3) and rotated. The norms are transformers'
    …RMSNorm: `weight` and `variance_epsilon`.
    """

    index: int
    block: nn.Module  # the whole layer, read for its training flag and gradient checkpointing
    norm1: nn.Module
    qkv: tuple[nn.Module, nn.Module, nn.Module]  # of query, key and value
    head_dim: int
    scale: float
    causal: bool
    window: int | None  # keys that a token sees, itself included; only if causal
    attention: nn.Module  # read for its training flag
    dropout: float  # rate on attention weights in training
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
        inference: bool,
        rows: Tensor | None = None,
        shared: Step | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(y, residual) -> (y, residual); the hidden state is their sum, (tokens, hidden).

        They stay separate because the next norm adds them. rows: compute the output for these tokens
        only (see `decode`). shared: the step, if some tokens of `packed` were computed earlier.
        """
        x, residual = add_norm(self.norm1, y, residual, inference)
        y = self.attend(x, cos, sin, packed, inference, rows, shared)
        if rows is not None:
            residual = residual[rows]
        x, residual = add_norm(self.norm2, linear(self.out, y, inference), residual, inference)
        gate, up = linears(self.gate_up, x, inference)
        return linear(
            self.down, activate(self.activation, gate, up, inference), inference
        ), residual

    def attend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        packed: Packed,
        inference: bool,
        rows: Tensor | None,
        shared: Step | None,
    ) -> Tensor:
        projections = project(self.qkv, x, rows, inference)
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in projections)
        queries, query_angles = None if shared is None else shared.queries, (cos, sin)
        if rows is not None:
            queries, query_angles = one_each(len(rows), x.device), (cos[rows], sin[rows])
        to_query, to_key, _ = self.qkv
        query = norm_and_rotate(to_query, self.query_norm, query, *query_angles, inference)
        key = norm_and_rotate(to_key, self.key_norm, key, cos, sin, inference)
        if shared is not None:
            key, value = shared.gather(self.index, key, value)
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

    def record(
        self, program: Program, y: Columns, residual: Columns, at: DecoderBuffers
    ) -> tuple[Columns, Columns]:
        """The calls of __call__ in inference. residual: NONE in the first layer."""
        for module in (self.block, self.attention):
            program.reads(module, training=False)
        if not is_silu(self.activation):
            raise Unfit(f"the activation is a {type(self.activation).__name__}, not SiLU")
        summed = NONE if residual == NONE else at.summed
        program.add_rms_norm(self.norm1, y, residual, at.input, summed)
        residual = y if residual == NONE else summed
        self.record_attention(program, at)
        if at.picked:
            program.pick(residual, at.picked_residual)
            residual = at.picked_residual
        summed = at.picked_residual if at.picked else at.summed
        program.linear([self.out], at.context, at.y)
        program.add_rms_norm(self.norm2, at.y, residual, at.normed, summed)
        program.linear(self.gate_up, at.normed, at.gate_up)
        program.silu_mul(self.gate_up, at.gate_up, at.inner)
        program.linear([self.down], at.inner, at.y)
        return at.y, summed

    def record_attention(self, program: Program, at: DecoderBuffers) -> None:
        """at.context = attention of at.input"""
        cos, sin = at.cos, at.sin
        if at.picked:
            for angles, picked in zip((cos, sin), at.picked_angles, strict=True):
                program.pick(angles, picked)
            program.pick(at.input, at.picked_input)
            program.linear(self.qkv[:1], at.picked_input, at.query)
            program.linear(self.qkv[1:], at.input, at.qkv)
            cos, sin = at.picked_angles
        else:
            program.linear(self.qkv, at.input, at.qkv)
        heads, kv_heads = (columns_of(m) // self.head_dim for m in self.qkv[:2])
        query, key = at.query, at.key
        if self.query_norm is not None:
            program.add_rms_norm(self.query_norm, query, NONE, at.query_normed, NONE, heads)
            query = at.query_normed
        if self.key_norm is not None:
            program.add_rms_norm(self.key_norm, key, NONE, at.key_normed, NONE, kv_heads)
            key = at.key_normed
        program.rope(query, cos, sin, heads, self.head_dim)
        program.rope(key, at.cos, at.sin, kv_heads, self.head_dim)
        program.attention(
            self.qkv,
            self.head_dim,
            (query, key, at.value),
            at.context,
            scale=self.scale,
            causal=self.causal,
            window=self.window,
        )


def record(layers: list[DecoderLayer], norm: nn.Module, program: Program, picked: bool) -> None:
    """The calls of decode_step without shared prefixes, for all tokens or for the picked ones."""
    if not layers:
        raise Unfit("there is no layer")
    program.width = hidden = columns_of(layers[0].out)
    half = layers[0].head_dim // 2
    y = program.buffer(hidden, external=True)
    cos, sin = program.buffer(half, external=True), program.buffer(half, external=True)
    out = program.buffer(hidden, per_sequence=picked, external=True)
    at = DecoderBuffers.of(program, layers[0], cos, sin)
    residual = NONE
    for layer in layers[:-1]:
        y, residual = layer.record(program, y, residual, at)
    if picked:
        at = at.pick(program, layers[-1])
    y, residual = layers[-1].record(program, y, residual, at)
    program.add_rms_norm(norm, y, residual, out, residual)


def norm_and_rotate(
    module: nn.Module, norm: nn.Module | None, x: Tensor, cos: Tensor, sin: Tensor, inference: bool
) -> Tensor:
    """The module's output x (tokens, heads, head_dim), normalised per head and rotated.

    In place only on a tensor that we made: a module may return one that it still uses.
    """
    may_write = type(module) is nn.Linear
    if norm is not None:
        x, may_write = add_norm(norm, x, None, inference)[0], True
    if not (inference and kernel_takes(ROPE, x, cos, sin)):
        return rotate(x, cos, sin)
    x = x if may_write else x.clone()
    ROPE(x, cos, sin)
    return x


def add_norm(
    norm: nn.Module, y: Tensor, residual: Tensor | None, inference: bool
) -> tuple[Tensor, Tensor]:
    """norm(y + residual) and the sum. A residual of None counts as zero."""
    if inference and kernel_takes(ADD_RMS_NORM, y, residual, norm.weight):
        normed, summed = ADD_RMS_NORM(y, residual, norm.weight, norm.variance_epsilon)
        return normed, y if residual is None else summed
    summed = y if residual is None else residual + y
    return norm(summed), summed


def activate(activation: nn.Module, gate: Tensor, up: Tensor, inference: bool) -> Tensor:
    """activation(gate) * up"""
    if inference and is_silu(activation) and kernel_takes(SILU_MUL, gate, up):
        return SILU_MUL(gate, up)
    return activation(gate) * up


def is_silu(activation: nn.Module) -> bool:
    from transformers.activations import SiLUActivation  # already imported by any model

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
    programs: Programs | None = None,
) -> Tensor:
    """norm(hidden states after the last layer).

    Args:
        layers: the layers, first to last.
        norm: the model's final norm.
        x: (tokens, hidden) embeddings.
        cos: (tokens, head_dim / 2), as in ops.rope, for each token's position.
        sin: as cos.
        packed: the sequences of x.
        rows: (batch,) int64, the last token of each sequence, if only their states are needed (the last,
            because attention counts query rows from the end). The last layer then computes keys and
            values for all tokens and everything else for these.
        shared: steps that compute a prefix shared by several sequences once; None computes every token.
        programs: of these layers; None runs op by op.

    Returns:
        (tokens, hidden), or (batch, hidden) if `rows` is given.
    """
    inference = is_inference(x)
    if shared is not None:
        return decode_shared(layers, norm, x, cos, sin, rows, shared)
    program = None if programs is None else programs.for_call(x, len(x), rows is not None)
    if program is not None and program.takes((x, cos, sin)):
        return program.run((x, cos, sin), packed, rows)
    states = [
        decode_step(layers, norm, x[tokens], cos[tokens], sin[tokens], step, inference, step_rows)
        for tokens, step, step_rows in split_into_steps(x, packed, rows)
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
        inputs = (t[step.tokens] for t in (x, cos, sin))
        step_rows = None if rows is None else step.last
        states = decode_step(layers, norm, *inputs, step.keys, True, step_rows, step)
        if out is None:  # here, because the norm decides the dtype
            out = states.new_empty(len(x) if rows is None else len(rows), x.shape[1])
        if rows is None:
            out[step.places] = states[step.source]
        else:
            out[step.sequences] = states
    return out


def decode_step(
    layers: list[DecoderLayer],
    norm: nn.Module,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    packed: Packed,
    inference: bool,
    rows: Tensor | None,
    shared: Step | None = None,
) -> Tensor:
    state = x, None
    for layer in layers:
        call = partial(
            layer,
            cos=cos,
            sin=sin,
            packed=packed,
            inference=inference,
            rows=rows if layer is layers[-1] else None,
            shared=shared,
        )
        state = checkpointed(layer.block, call, *state)
    if rows is not None and not layers:
        state = x[rows], None
    return add_norm(norm, *state, inference)[0]
