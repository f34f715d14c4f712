"""A tower as one call: what depends on the model and its dtype alone is decided once.

A program is a list of the kernel calls that the ops would make, so its values have the same bits. It is
recorded from a tower's layers, and again as soon as anything that it depends on has changed. On the CPU one
native call runs the list, on a GPU nn.device_calls.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedfuse import native
from embedfuse.nn.tower import split_into_steps
from embedfuse.ops.checks import is_dense
from embedfuse.ops.linear import FEW_ROWS
from embedfuse.ops.varlen_attention import MAX_HEAD_DIM
from embedfuse.packing import Packed
from embedfuse.registry import triton_interprets

Columns = tuple[int, int]
"""A buffer of a program and the first column that is meant; NONE for none."""
NONE: Columns = (-1, 0)
_NO_PARAMETER = object()
_IDS = (torch.int64, torch.int32)
_NO_IDS = (None, None, None)


class Unfit(Exception):
    """A layer has something that no kernel computes, and what: the tower runs op by op."""


class Program:
    """Recorded kernel calls, and all that they depend on.

    Its methods record; `run` runs.

    Args:
        dtype: of the weights and of all rows.
        device: of these.

    Attributes:
        width: columns of the states.
        refusal: why it does not hold the whole tower; None if it does.
        counts_positions: whether it finds the position ids itself.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.width = 0
        self.counts_positions = self._native = not runs_triton(device)
        self.calls = _calls(dtype, device)
        self.refusal: str | None = None
        self._widths: list[int] = []  # of each buffer
        self._external: list[int] = []  # of the external ones
        self._slots: list[tuple[dict, str, object]] = []
        self._parameters: list[Tensor] = []
        self._held: list[
            Tensor
        ] = []  # their memory, so that it is not given back before a run's end

    def buffer(
        self,
        columns: int,
        *,
        per_sequence: bool = False,
        external: bool = False,
        over: Columns = NONE,
    ) -> Columns:
        """A matrix of so many columns, with a row per token or per sequence.

        external: its tensor is given to `run`, or made there. over: a buffer whose memory it may use.
        """
        self._widths.append(columns)
        if external:
            self._external.append(columns)
        return self.calls.buffer(columns, per_sequence, external, over[0]), 0

    def reads(self, module: nn.Module, **settings: object) -> None:
        """Unfit if one of these attributes has another value; they are compared again before each run."""
        attributes = vars(module)
        for name, value in settings.items():
            self._slots.append((attributes, name, attributes[name]))
            if attributes[name] != value:
                raise Unfit(f"{type(module).__name__}.{name} is {attributes[name]!r:.80}")

    def parameter(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> Any:
        """As the calls take it: its address, or 0 for None; on a GPU the tensor, or None."""
        parameters, what = module._parameters, f"{type(module).__name__}.{name}"
        if name not in parameters:  # a plain tensor in its place
            self._slots.append((parameters, name, _NO_PARAMETER))  # never equal: looked for again
            raise Unfit(f"{what} is no parameter")
        parameter = parameters[name]
        self._slots.append((parameters, name, parameter))
        if parameter is None:
            return 0 if self._native else None
        if not is_dense(parameter):
            raise Unfit(f"{what} is a {type(parameter).__name__}, or not dense")
        held = parameter.detach()  # of what it is now, whatever another thread makes of it
        self._parameters.append(parameter)  # before the checks, so that a later change is seen
        self._held.append(held)
        if (held.dtype, held.device) != (self.dtype, self.device):
            others = f"others are {self.dtype} on {self.device}"
            raise Unfit(f"{what} is {held.dtype} on {held.device}; {others}")
        if held.shape != shape or not held.is_contiguous():
            found = f"shape {tuple(held.shape)} and strides {held.stride()}"
            raise Unfit(f"{what} has {found}; accepted is {shape}, contiguous")
        return held.data_ptr() if self._native else held

    def table(self, module: nn.Module, columns: int) -> tuple[Any, int]:
        """An embedding table as the calls take it, and its rows."""
        if type(module) is not nn.Embedding:
            raise Unfit(f"an embedding is a {type(module).__name__}")
        self.reads(module, max_norm=None)
        rows = len(module.weight)
        table = self.parameter(module, "weight", (rows, columns))
        if rows == 0:  # row 0 is read without ids
            raise Unfit("an embedding has no row")
        return table, rows

    def linear(
        self, modules: Sequence[nn.Module], x: Columns, out: Columns, gelu: bool = False
    ) -> None:
        """out = module(x) of each module, side by side."""
        depth = self._widths[x[0]]
        parts, width = [], 0
        for module in modules:
            columns = columns_of(module)
            weight = self.parameter(module, "weight", (columns, depth))
            parts += [weight, self.parameter(module, "bias", (columns,)), columns]
            width += columns
        if width != self._widths[out[0]]:
            raise Unfit(f"linear layers have {width} columns, not {self._widths[out[0]]}")
        self.calls.linear(x, parts, depth, gelu, out)

    def add_layer_norm(self, norm: nn.Module, x: Columns, residual: Columns, out: Columns) -> None:
        """out = norm(x + residual)"""
        if type(norm) is not nn.LayerNorm or norm.weight is None:
            raise Unfit(f"a norm is a {type(norm).__name__}, or has no weight")
        self.reads(norm, eps=norm.eps)
        shape = (self._widths[x[0]],)
        weight, bias = (self.parameter(norm, name, shape) for name in ("weight", "bias"))
        self.calls.add_layer_norm(x, residual, weight, bias, norm.eps, out)

    def add_rms_norm(
        self,
        norm: nn.Module,
        x: Columns,
        residual: Columns,
        normed: Columns,
        summed: Columns,
        heads: int = 1,
    ) -> None:
        """normed = norm(summed), summed = x + residual, per head; without a residual, x alone."""
        width = self._widths[normed[0]] // heads
        weight, eps = self.parameter(norm, "weight", (width,)), norm.variance_epsilon
        self.reads(norm, variance_epsilon=eps)
        self.calls.add_rms_norm(x, residual, weight, heads, width, eps, normed, summed)

    def attention(
        self,
        qkv: Sequence[nn.Module],
        head_dim: int,
        heads: tuple[Columns, Columns, Columns],
        out: Columns,
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
    ) -> None:
        """out = attention of query, key and value, which are `heads`, the outputs of qkv."""
        width, kv_width, value_width = map(columns_of, qkv)
        if width % head_dim or kv_width % head_dim or width % kv_width or kv_width != value_width:
            raise Unfit(f"query, key, value: {width}, {kv_width}, {value_width} columns")
        if head_dim > MAX_HEAD_DIM:
            raise Unfit(f"head_dim is {head_dim}, above {MAX_HEAD_DIM}")
        counts = width // head_dim, kv_width // head_dim
        self.calls.attention(*heads, *counts, head_dim, scale, causal, window or 0, out)

    def rope(self, x: Columns, cos: Columns, sin: Columns, heads: int, head_dim: int) -> None:
        """Rotate x in place."""
        if self._widths[cos[0]] != head_dim // 2 or head_dim % 2:
            raise Unfit(f"head_dim is {head_dim}, angles are {self._widths[cos[0]]}")
        self.calls.rope(x, cos, sin, heads, head_dim)

    def silu_mul(self, gate_up: Sequence[nn.Module], x: Columns, out: Columns) -> None:
        """out = silu(gate) up; x holds both, the outputs of gate_up."""
        inner = self._widths[out[0]]
        if any(columns_of(module) != inner for module in gate_up):
            raise Unfit("gate and up have other numbers of columns than the layer below")
        self.calls.silu_mul(x, (x[0], inner), inner, out)

    def pick(self, x: Columns, out: Columns) -> None:
        """out = the picked rows of x."""
        self.calls.pick(x, self._widths[out[0]], out)

    def finish(self) -> None:
        """Keep what is_current compares, in the form in which that is fastest."""
        self._read = tuple(zip(*self._slots, strict=True)) or ((), (), ())
        self._state = _state_of(self._held)

    def is_current(self) -> bool:
        """Whether all that was read is unchanged: settings, parameters, and where these are in memory."""
        return native.comparison()((), (), (), (), *self._read) and (
            _state_of(self._parameters) == self._state
        )

    def takes(self, inputs: Sequence[Tensor], ids: Sequence[Tensor | None] = ()) -> bool:
        """Whether `run` can read these; if not, the ops give torch's errors."""
        return all(
            is_dense(t)
            and (t.dtype, t.device) == (self.dtype, self.device)
            and t.shape[1:] == (width,)
            for t, width in zip(inputs, self._external, strict=False)
        ) and all(t is None or (t.device == self.device and t.dtype in _IDS) for t in ids)

    def run(
        self,
        inputs: Sequence[Tensor],
        packed: Packed,
        rows: Tensor | None = None,
        ids: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """States (tokens, hidden), or (sequences, hidden) of `rows`, in the steps of split_into_steps.

        Args:
            inputs: the external buffers in their order, without the last, which is made here.
            packed: the sequences of the inputs.
            rows: (sequences,) the token of each sequence that is wanted; None for all.
            ids: (tokens,) each, for `embed`: input, type and position ids. The types may be None, and the
                positions if the program counts them.

        Raises:
            IndexError: an id that its table does not have. On a GPU torch says so when it can.
        """
        shape = packed.tokens if rows is None else len(rows), self.width
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        inputs = [t.contiguous() for t in inputs]
        ids = [None if t is None else t.to(torch.int64).contiguous() for t in ids]
        run = self._run_native if self._native else self.calls.run
        first = 0
        for tokens, step, step_rows in split_into_steps(out, packed, rows):
            if step is packed:  # the only one
                run([*inputs, out], packed, rows, ids or _NO_IDS)
                break
            last = first + (step.tokens if step_rows is None else step.sequences)
            external = [*(t[tokens] for t in inputs), out[first:last]]
            step_ids = [None if t is None else t[tokens] for t in ids or _NO_IDS]
            run(external, step, step_rows, step_ids)
            first = last
        return out

    def _run_native(
        self,
        external: Sequence[Tensor],
        packed: Packed,
        rows: Tensor | None,
        ids: Sequence[Tensor | None],
    ) -> None:
        picked = None if rows is None else rows.to(torch.int32)
        self.calls.run(
            [t.data_ptr() for t in external],
            packed.tokens,
            packed.sequences,
            packed.cu_seqlens.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in (picked, *ids)),
        )


def columns_of(module: nn.Module) -> int:
    """Of a linear layer's output."""
    if type(module) is not nn.Linear:
        raise Unfit(f"a linear layer is a {type(module).__module__}.{type(module).__qualname__}")
    return len(module.weight)


def _state_of(parameters: list[Tensor]) -> tuple:
    return native.layouts()(parameters), list(map(Tensor.is_neg, parameters))


def _calls(dtype: torch.dtype, device: torch.device) -> Any:
    if not runs_triton(device):
        return native.cpu().Program(native.DTYPES[dtype], FEW_ROWS)
    from embedfuse.nn.device_calls import DeviceCalls  # imports Triton

    return DeviceCalls(dtype, device)


def runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" or triton_interprets()
