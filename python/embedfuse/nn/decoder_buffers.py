"""Where a decoder's program keeps what a layer computes."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from embedfuse.nn.program import NONE, Columns, Program, columns_of

if TYPE_CHECKING:
    from embedfuse.nn.decoder import DecoderLayer


@dataclass(frozen=True)
class DecoderBuffers:
    """What a layer keeps in a program. Those without a comment have all rows, or the picked ones."""

    picked: bool
    cos: Columns  # all rows
    sin: Columns  # all rows
    input: Columns  # all rows, normalised
    summed: Columns  # all rows
    qkv: Columns  # all rows: query, key and value, or without the query
    query: Columns
    key: Columns  # all rows
    value: Columns  # all rows
    query_normed: Columns
    key_normed: Columns  # all rows
    context: Columns
    y: Columns
    normed: Columns
    gate_up: Columns
    inner: Columns
    # If picked, the picked rows of these:
    picked_angles: tuple[Columns, Columns] = (NONE, NONE)
    picked_input: Columns = NONE
    picked_residual: Columns = NONE

    @classmethod
    def of(
        cls, program: Program, layer: "DecoderLayer", cos: Columns, sin: Columns
    ) -> "DecoderBuffers":
        width, kv_width, _ = map(columns_of, layer.qkv)
        hidden, inner = columns_of(layer.out), columns_of(layer.gate_up[0])
        qkv = program.buffer(width + 2 * kv_width)
        y = program.buffer(hidden)
        gate_up = program.buffer(2 * inner, over=qkv)
        return cls(
            picked=False,
            cos=cos,
            sin=sin,
            input=program.buffer(hidden),
            summed=program.buffer(hidden),
            qkv=qkv,
            query=qkv,
            key=(qkv[0], width),
            value=(qkv[0], width + kv_width),
            query_normed=program.buffer(width),
            key_normed=program.buffer(kv_width),
            context=program.buffer(width),
            y=y,
            normed=program.buffer(hidden),
            gate_up=gate_up,
            inner=program.buffer(inner),
        )

    def pick(self, program: Program, layer: "DecoderLayer") -> "DecoderBuffers":
        """Those of a last layer of which only the picked rows are wanted, after layers with these."""
        width, kv_width, _ = map(columns_of, layer.qkv)
        hidden, inner = columns_of(layer.out), columns_of(layer.gate_up[0])

        def picked(columns: int) -> Columns:
            return program.buffer(columns, per_sequence=True)

        qkv = program.buffer(2 * kv_width, over=self.qkv)
        return replace(
            self,
            picked=True,
            qkv=qkv,
            query=picked(width),
            key=qkv,
            value=(qkv[0], kv_width),
            query_normed=picked(width),
            context=picked(width),
            y=picked(hidden),
            normed=picked(hidden),
            gate_up=picked(2 * inner),
            inner=picked(inner),
            picked_angles=(picked(layer.head_dim // 2), picked(layer.head_dim // 2)),
            picked_input=picked(hidden),
            picked_residual=picked(hidden),
        )
