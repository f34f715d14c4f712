"""A tower on a GPU as a list of launches: what nn.program records, without a look-up between two kernels."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from embedfuse.nn.attention import choose
from embedfuse.nn.flash import Flash
from embedfuse.nn.program import Columns
from embedfuse.packing import Packed, one_each
from embedfuse.triton_kernels import add_layer_norm, add_rms_norm, rope, silu_mul, varlen_attention
from embedfuse.triton_kernels.launch import kinds, widths

_LINE = 256  # elements; every buffer begins where a tensor of its own could
# Places of the tensors that each run has anew.
_ABSENT, _CU_SEQLENS, _CU_PICKED = range(3)


@dataclass(frozen=True)
class Buffer:
    """A matrix with one row per token, or one per sequence.

    over: the buffer whose memory it may use, or -1.
    """

    columns: int
    per_sequence: bool
    external: bool
    over: int


@dataclass
class Run:
    """What one run works on.

    Attributes:
        tensors: by place: weights, parts of buffers, and the sequences' bounds.
        addresses: of these.
        rows: tokens, sequences.
        packed: the sequences of the tokens.
        queries: those of the picked rows.
        picked: (sequences,) the token of each sequence in buffers with a row per sequence.
        ids: input, type and position ids, (tokens,) each.
        direct: what launches without a look-up on tensors of these kinds.
    """

    tensors: list[Any]
    addresses: list[int | None]
    rows: tuple[int, int]
    packed: Packed
    queries: Packed | None
    picked: Any
    ids: Sequence[Any]
    direct: dict[tuple, Callable]


class DeviceCalls:
    """The kernel calls of csrc/cpu/program.h, with the kernels that the ops run on a GPU.

    Its methods record, with tensors where those of the C++ class have addresses. All that depends on the
    recorded shapes is decided there. A part of a buffer (the key in a product of query, key and value) is a
    dense matrix of its own, because cuBLAS adds a bias on its way to dense memory alone; so it computes
    what the ops compute. Memory is taken from torch in each run, which makes runs on several streams, in
    several threads and in the capture of a CUDA graph safe.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._buffers: list[Buffer] = []
        self._made: set[int] = set()  # buffers that a call makes anew
        self._fixed: list[Tensor | None] = [None] * 3
        self._addresses: list[int | None] = [None] * 3
        self._slots: dict[tuple, int] = {}  # (buffer, first column, shape of a row) -> place
        self._calls: list[Callable[[Run], None]] = []
        self._direct: dict[tuple, dict] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def buffer(self, columns: int, per_sequence: bool, external: bool, over: int) -> int:
        self._buffers.append(Buffer(columns, per_sequence, external, over))
        return len(self._buffers) - 1

    def embed(self, words, types, positions, padding_idx: int, sums: Columns, places: Columns):
        """sums + places are the embeddings; words, types, positions: table and its rows."""
        (words, _), (types, _), (positions, _) = words, types, positions
        first, second = (self._slot(x, words.shape[1]) for x in (sums, places))

        def call(run: Run) -> None:
            ids, type_ids, position_ids = run.ids
            x, y = run.tensors[first], run.tensors[second]
            torch.index_select(words, 0, ids, out=x)
            if type_ids is None:
                x.add_(types[0])
            else:
                x.add_(torch.index_select(types, 0, type_ids, out=y))
            torch.index_select(positions, 0, position_ids, out=y)

        self._calls.append(call)

    def linear(self, x: Columns, parts: Sequence, depth: int, gelu: bool, out: Columns) -> None:
        """parts: weight, bias or None, and columns of each."""
        source = self._slot(x, depth)
        buffer, first = out
        for weight, bias, columns in zip(*[iter(parts)] * 3, strict=True):
            self._product(source, weight.t(), bias, self._slot((buffer, first), columns), gelu)
            first += columns

    def _product(self, x: int, weight: Tensor, bias: Any, out: int, gelu: bool) -> None:
        def product(run: Run) -> None:
            torch.mm(run.tensors[x], weight, out=run.tensors[out])

        def sum_(run: Run) -> None:
            torch.addmm(bias, run.tensors[x], weight, out=run.tensors[out])

        self._calls.append(product if bias is None else sum_)
        if gelu:
            self._calls.append(lambda run: torch.ops.aten.gelu_(run.tensors[out]))

    def add_layer_norm(self, x, residual, weight, bias, eps: float, out) -> None:
        hidden = len(weight)
        launch = add_layer_norm.prepare(self.device, self.dtype, hidden, hidden, hidden, eps)
        parameters = self._parameter(weight), self._parameter(bias)
        x, residual, normed = (self._slot(c, hidden) for c in (x, residual, out))
        self._add(launch, out, 1, x, residual, *parameters, normed)

    def add_rms_norm(
        self, x, residual, weight, heads: int, hidden: int, eps: float, normed, summed
    ) -> None:
        width = heads * hidden
        head = hidden if heads > 1 else 0
        strides = width, head, *((0, 0) if residual[0] < 0 else (width, head))
        launch = add_rms_norm.prepare(self.device, self.dtype, heads, hidden, *strides, eps)
        places = [self._slot(c, width) for c in (x, residual, normed, summed)]
        self._add(launch, normed, heads, *places[:2], self._parameter(weight), *places[2:])

    def rope(self, x: Columns, cos: Columns, sin: Columns, heads: int, head_dim: int) -> None:
        half, width = head_dim // 2, heads * head_dim
        launch = rope.prepare(self.device, self.dtype, heads, half, width, head_dim, half, half)
        places = self._slot(x, width), self._slot(cos, half), self._slot(sin, half)
        self._add(launch, x, 1, *places)

    def silu_mul(self, gate: Columns, up: Columns, columns: int, out: Columns) -> None:
        launch = silu_mul.prepare(self.device, self.dtype, columns, columns, columns)
        self._add(launch, out, 1, *(self._slot(c, columns) for c in (gate, up, out)))

    def attention(self, query, key, value, *shape_and_out) -> None:
        heads, kv_heads, head_dim, scale, causal, window, out = shape_and_out
        shape = heads, kv_heads, head_dim
        mask = scale, causal, window or None
        like = torch.empty(0, heads, head_dim, dtype=self.dtype, device=self.device)
        chosen = choose(like, like, like, 0.0)
        if isinstance(chosen, Flash):
            self._add_flash(chosen, (query, key, value), shape, mask, out)
        else:
            self._add_varlen((query, key, value), shape, mask, out)

    def _add_flash(self, flash: Flash, heads, shape, mask, out: Columns) -> None:
        query_heads, kv_heads, head_dim = shape
        picked = self._buffers[heads[0][0]].per_sequence
        query, key, value = (
            self._slot(columns, n, head_dim)
            for columns, n in zip(heads, (query_heads, kv_heads, kv_heads), strict=True)
        )
        self._made.add(out[0])
        place = self._slot(out, query_heads * head_dim)

        def call(run: Run) -> None:
            t, queries = run.tensors, run.queries if picked else run.packed
            t[place] = flash(t[query], t[key], t[value], queries, run.packed, *mask).flatten(1)

        self._calls.append(call)

    def _add_varlen(self, heads, shape, mask, out: Columns) -> None:
        query_heads, kv_heads, head_dim = shape
        picked = self._buffers[heads[0][0]].per_sequence
        widths = [n * head_dim for n in (query_heads, kv_heads, kv_heads)]
        places = [
            *(self._slot(c, n) for c, n in zip((*heads, out), (*widths, widths[0]), strict=True)),
            _CU_PICKED if picked else _CU_SEQLENS,
            _CU_SEQLENS,
        ]
        strides = [stride for width in widths for stride in (width, head_dim)]
        call = self._launched(*places)

        def attend(run: Run) -> None:
            tokens, batch = run.rows[picked], run.rows[1]
            rows = varlen_attention.average_rows(tokens, query_heads // kv_heads, batch)
            launch = varlen_attention.prepare(
                self.device, self.dtype, *shape, rows, *mask, *strides
            )
            call(run, launch, varlen_attention.tiles(launch, tokens, batch), (batch,))

        self._calls.append(attend)

    def pick(self, x: Columns, columns: int, out: Columns) -> None:
        source, place = self._slot(x, columns), self._slot(out, columns)

        def call(run: Run) -> None:
            torch.index_select(run.tensors[source], 0, run.picked, out=run.tensors[place])

        self._calls.append(call)

    def run(
        self,
        external: Sequence[Tensor],
        packed: Packed,
        picked: Tensor | None,
        ids: Sequence[Tensor | None],
    ) -> None:
        """Run all calls; external: the external buffers in their order, dense."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device:
            run = self._begin(external, packed, picked, ids)
            for call in self._calls:
                call(run)

    def _begin(self, external, packed, picked, ids) -> Run:
        rows = packed.tokens, packed.sequences
        starts, size = self._layout(rows)
        arena = torch.empty(size, dtype=self.dtype, device=self.device)
        tensors: list[Any] = self._fixed.copy()
        addresses = self._addresses.copy()
        queries = None if picked is None else one_each(len(picked), self.device)
        tensors[_CU_SEQLENS] = packed.cu_seqlens.contiguous()
        tensors[_CU_PICKED] = None if queries is None else queries.cu_seqlens
        given = dict(zip(self._external(), external, strict=True))
        for (buffer, first, shape), place in self._slots.items():
            if buffer in given:
                tensors[place] = given[buffer]
            elif buffer not in self._made:
                n = rows[self._buffers[buffer].per_sequence]
                tensors[place] = matrix(arena, n, shape, starts[buffer] + n * first)
        changing = [_CU_SEQLENS, _CU_PICKED, *self._slots.values()]
        for place in changing:
            if tensors[place] is not None:
                addresses[place] = tensors[place].data_ptr()
        pointers = itemgetter(*changing)
        key = kinds(pointers(tensors), pointers(addresses)), widths(rows)
        direct = self._direct.setdefault(key, {})
        return Run(tensors, addresses, rows, packed, queries, picked, ids, direct)

    def _layout(self, rows: tuple[int, int]) -> tuple[list[int], int]:
        """Where each buffer begins, in elements, and the size of all."""
        sizes = [0] * len(self._buffers)
        owners = [b.over if b.over >= 0 else i for i, b in enumerate(self._buffers)]
        for i, (buffer, owner) in enumerate(zip(self._buffers, owners, strict=True)):
            if not (buffer.external or i in self._made):
                size = -(-rows[buffer.per_sequence] * buffer.columns // _LINE) * _LINE
                sizes[owner] = max(sizes[owner], size)
        starts = list(accumulate(sizes, initial=0))
        return [starts[owner] for owner in owners], starts[-1]

    def _external(self) -> list[int]:
        return [i for i, buffer in enumerate(self._buffers) if buffer.external]

    def _slot(self, x: Columns, *shape: int) -> int:
        """The place of a part of a buffer, of which a row has this shape."""
        buffer, first = x
        if buffer < 0:
            return _ABSENT
        part = buffer, first, shape
        if part not in self._slots:
            self._slots[part] = self._parameter(None)
        return self._slots[part]

    def _parameter(self, weight: Tensor | None) -> int:
        self._fixed.append(weight)
        self._addresses.append(None if weight is None else weight.data_ptr())
        return len(self._fixed) - 1

    def _add(self, launch, x: Columns, times: int, *places: int) -> None:
        """A launch for each row of x, `times` programs for one."""
        call, per_sequence = self._launched(*places), self._buffers[x[0]].per_sequence
        self._calls.append(lambda run: call(run, launch, run.rows[per_sequence] * times))

    def _launched(self, *places: int) -> Callable:
        """What launches on these places; by Triton's look-up on tensors of kinds that are new."""
        pointers = itemgetter(*places)

        def call(run: Run, launch, rows: int, numbers: tuple[int, ...] = ()) -> None:
            direct = run.direct.get((launch, places))
            if direct is not None:
                direct((rows, launch.columns, 1), *pointers(run.addresses), *numbers)
                return
            direct = launch.by_look_up(rows, *pointers(run.tensors), numbers=numbers)
            if direct is not None:
                run.direct[launch, places] = direct

        return call


def matrix(arena: Tensor, rows: int, shape: tuple[int, ...], start: int) -> Tensor:
    """A dense (rows, *shape) from this element of the arena on."""
    strides = [1]
    for n in reversed(shape):
        strides.append(strides[-1] * n)
    return arena.as_strided((rows, *shape), strides[::-1], start)
