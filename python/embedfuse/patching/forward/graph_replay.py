"""Small batches of a patched model, run by CUDA graphs (see nn.graphs)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from embedfuse import config
from embedfuse.nn.graphs import GraphCache, Room, Snapshot, bucket, buckets
from embedfuse.nn.linear import is_inference
from embedfuse.packing import Packed, unpadded
from embedfuse.patching.forward.tokens import Tokens, rows_of
from embedfuse.patching.layout import Layout
from embedfuse.registry import forced_backend

_IDS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class SmallBatch:
    """A call of run_packed, in a bucket of (tokens, sequences). Buffers: cu_seqlens, then `tokens.given`.

    The bucket's cu_seqlens has one sequence more, of the tokens that are left free.
    """

    model: nn.Module
    layout: Layout
    packed: Packed
    tokens: Tokens
    pooling: str | None
    size: tuple[int, int]

    @property
    def key(self) -> tuple:
        dtypes = tuple((name, t.dtype) for name, t in self.tokens.given.items())
        tf32 = torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision
        settings = forced_backend(), torch.are_deterministic_algorithms_enabled(), tf32
        return self.size, self.pooling, dtypes, settings

    def buffers(self) -> tuple[Tensor, ...]:
        tokens, sequences = self.size
        device = self.packed.cu_seqlens.device
        ends = torch.full((sequences + 2,), tokens, dtype=torch.int32, device=device)
        given = self.tokens.given.values()
        return ends, *(torch.zeros(tokens, dtype=t.dtype, device=device) for t in given)

    def fill(self, buffers: tuple[Tensor, ...]) -> None:
        ends, *buffers = buffers
        sequences, tokens = self.packed.sequences, self.packed.tokens
        ends[: sequences + 1].copy_(self.packed.cu_seqlens)
        ends[sequences + 1 : -1].fill_(tokens)
        # Of an earlier batch, what lies behind may stay: those are ids and positions that exist.
        for buffer, given in zip(buffers, self.tokens.given.values(), strict=True):
            buffer[:tokens].copy_(given)

    def forward(self, buffers: tuple[Tensor, ...]) -> Tensor:
        ends, *buffers = buffers
        tokens = Tokens(**dict(zip(self.tokens.given, buffers, strict=True)))
        room = Room(self.size[0], ends)
        rows = rows_of(room, self.pooling)
        if rows is not None:  # that of an empty sequence may lie beyond the last token
            rows = rows.clamp(max=self.size[0] - 1)
        return self.model.run_packed(self.layout, room, tokens, rows)

    def own(self, output: Tensor) -> Tensor:
        return output[: self.packed.tokens if self.pooling is None else self.packed.sequences]


def replayed(
    model: nn.Module, layout: Layout, packed: Packed, tokens: Tokens, pooling: str | None
) -> Tensor | None:
    """What run_packed returns, from a graph; None where it has to run.

    pooling: of these rows alone, or None.
    """
    state = model._embedfuse
    device = tokens.input_ids.device
    if why := refusal(state.graphs, device):
        state.report.graphs = f"none: {why}"
        return None
    size = bucket(packed.tokens, packed.sequences)
    if (
        size is None
        or layout is not state.layout  # a replica shares the state
        or not is_inference(tokens.input_ids)
        or any(module.training for module in (model, *layout.modules))
        or any(t.device != model.device or t.dtype not in _IDS for t in tokens.given.values())
        or not model.replays(packed, size[0])
    ):
        return None
    batch = SmallBatch(model, layout, packed, tokens, pooling, size)
    states = state.graphs.run(layout.modules, batch, partial(unfit, layout, device))
    why, captured = state.graphs.refusal, len(state.graphs)
    state.report.graphs = f"none: {why}" if why else f"{captured} captured"
    return states


def warm(model: nn.Module, tokens: int, sequences: int, pooling: str | None) -> int:
    """Capture what the model may replay of these buckets; how many graphs there are then."""
    state, layout = model._embedfuse, model._current_layout()
    device = model.device
    if why := refusal(state.graphs, device) or layout.refusal:
        state.report.graphs = f"none: {why}"
        return 0
    for path, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"model: {path or 'it'} is in training; accepted is a model after eval(), because graphs "
                "serve inference"
            )
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            f"warm_up: called under autocast on {device.type}; accepted is a call without, because no "
            "graph serves others"
        )
    kinds = 1 + (getattr(model.config, "type_vocab_size", 1) > 1)  # tokenizers give types or do not
    for most_tokens, most_sequences in buckets(tokens, sequences):
        n = min(most_tokens, most_sequences)
        lengths = [most_tokens // n + (i < most_tokens % n) for i in range(n)]
        packed = unpadded(lengths, device)
        fits = packed.max_seqlen <= model.longest_sequence() and model.replays(packed, most_tokens)
        if not fits or bucket(packed.tokens, n) != (most_tokens, most_sequences):
            continue
        ids = torch.zeros(most_tokens, dtype=torch.int64, device=device)
        for given in (Tokens(ids), Tokens(ids, token_type_ids=ids))[:kinds]:
            for _ in range(2):  # the second time it is captured
                with torch.inference_mode():
                    model.run(layout, packed, given, pooling)
    return len(state.graphs)


def refusal(graphs: GraphCache, device: torch.device) -> str | None:
    """Why batches on this device run without graphs."""
    if device.type != graphs.device_graphs.device_type:
        return f"the model runs on {device.type}"
    if config.read("EMBEDFUSE_GRAPHS") == "0":
        return "EMBEDFUSE_GRAPHS=0"
    return None


def unfit(layout: Layout, device: torch.device, snapshot: Snapshot) -> str | None:
    """Why the model cannot be captured."""
    if layout.foreign:
        path, module = layout.foreign[0]
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"{path} is a {kind}, which may do another thing in another call"
    for tensor in snapshot.tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"weights of type {type(tensor).__name__}"
        if tensor.device != device:
            return f"weights on {tensor.device} and tokens on {device}"
    return None
