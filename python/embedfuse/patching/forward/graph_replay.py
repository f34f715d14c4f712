"""Small batches of a patched model, run by CUDA graphs (see nn.graphs)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from embedfuse import config
from embedfuse.nn.graphs import GraphCache, Snapshot, bucket, buckets
from embedfuse.nn.linear import is_inference
from embedfuse.packing import Packed, unpadded
from embedfuse.patching.forward.tokens import Batch, Tokens, pooled_rows
from embedfuse.patching.layout import Layout, name_of
from embedfuse.registry import forced_backend

_IDS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class SmallBatch:
    """A call of run_layers in a bucket of (tokens, sequences), for nn.graphs.

    Its buffers are the bucket's cu_seqlens, with one sequence more for the unused tokens, then those of
    `tokens.given`.
    """

    model: nn.Module
    batch: Batch
    pooling: str | None
    bucket: tuple[int, int]

    @property
    def key(self) -> tuple:
        dtypes = tuple((name, t.dtype) for name, t in self.batch.tokens.given.items())
        tf32 = torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision
        settings = forced_backend(), torch.are_deterministic_algorithms_enabled(), tf32
        return self.bucket, self.pooling, dtypes, settings

    def buffers(self) -> tuple[Tensor, ...]:
        tokens, sequences = self.bucket
        device = self.batch.packed.cu_seqlens.device
        ends = torch.full((sequences + 2,), tokens, dtype=torch.int32, device=device)
        given = self.batch.tokens.given.values()
        return ends, *(torch.zeros(tokens, dtype=t.dtype, device=device) for t in given)

    def fill(self, buffers: tuple[Tensor, ...]) -> None:
        ends, *buffers = buffers
        packed = self.batch.packed
        ends[: packed.sequences + 1].copy_(packed.cu_seqlens)
        ends[packed.sequences + 1 : -1].fill_(packed.tokens)
        # Unused tokens keep the ids and positions of an earlier batch, which are valid ones.
        for buffer, given in zip(buffers, self.batch.tokens.given.values(), strict=True):
            buffer[: packed.tokens].copy_(given)

    def forward(self, buffers: tuple[Tensor, ...]) -> Tensor:
        ends, *buffers = buffers
        size, _ = self.bucket
        packed = Packed(None, ends, (1, size), None)
        tokens = Tokens(**dict(zip(self.batch.tokens.given, buffers, strict=True)))
        rows = pooled_rows(packed, self.pooling)
        if rows is not None:  # the row of an empty sequence may lie beyond the last token
            rows = rows.clamp(max=size - 1)
        return self.model.run_layers(Batch(self.batch.layout, packed, tokens), rows)

    def cut(self, output: Tensor) -> Tensor:
        packed = self.batch.packed
        return output[: packed.tokens if self.pooling is None else packed.sequences]


def replayed(model: nn.Module, batch: Batch, pooling: str | None) -> Tensor | None:
    """What run_layers returns, from a graph; None where it has to run.

    pooling: "cls" or "last" for the rows that it reads, None for all.
    """
    state = model._embedfuse
    layout, packed, tokens = batch.layout, batch.packed, batch.tokens
    device = tokens.input_ids.device
    if refusal := device_refusal(state.graphs, device):
        state.report.graphs = f"none: {refusal}"
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
    small = SmallBatch(model, batch, pooling, size)
    states = state.graphs.run(layout.modules, small, partial(capture_refusal, layout, device))
    refusal, captured = state.graphs.refusal, len(state.graphs)
    state.report.graphs = f"none: {refusal}" if refusal else f"{captured} captured"
    return states


def warm(model: nn.Module, tokens: int, sequences: int, pooling: str | None) -> int:
    """Capture what the model may replay of these buckets; how many graphs there are then."""
    state, device = model._embedfuse, model.device
    refusal = device_refusal(state.graphs, device)
    if refusal is None:
        _, refusal = _admitted(model, unpadded([1], device))
    if refusal is not None:
        state.report.graphs = f"none: {refusal}"
        return 0
    for path, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"model: {path or 'it'} is in training; accepted is a model after eval(), because graphs "
                "run inference"
            )
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            f"warm_up: called under autocast on {device.type}; accepted is a call without, because graphs "
            "run without"
        )
    # Some tokenizers give token types.
    kinds = 1 + (getattr(model.config, "type_vocab_size", 1) > 1)
    for most_tokens, most_sequences in buckets(tokens, sequences):
        n = min(most_tokens, most_sequences)
        packed = unpadded([most_tokens // n + (i < most_tokens % n) for i in range(n)], device)
        fits = packed.max_seqlen <= model.longest_sequence() and model.replays(packed, most_tokens)
        if not fits or bucket(packed.tokens, n) != (most_tokens, most_sequences):
            continue
        for types in (False, True)[:kinds]:
            batch, _ = _admitted(model, packed, types)
            for _ in range(2):  # the second time it is captured
                with torch.inference_mode():
                    model.run(batch, pooling)
    return len(state.graphs)


def _admitted(
    model: nn.Module, packed: Packed, types: bool = False
) -> tuple[Batch | None, str | None]:
    """What `admit` answers for tokens 0 laid out like `packed`, with or without token types."""
    ids = torch.zeros(packed.tokens, dtype=torch.int64, device=model.device)
    call = {"input_ids": ids, "token_type_ids": ids if types else None}
    with torch.inference_mode():
        return model.admit(call, packed)


def device_refusal(graphs: GraphCache, device: torch.device) -> str | None:
    """Why batches on this device run without graphs."""
    if device.type != graphs.device_graphs.device_type:
        return f"the model runs on {device.type}"
    if config.read("EMBEDFUSE_GRAPHS") != "1":
        return "EMBEDFUSE_GRAPHS is not 1"
    return None


def capture_refusal(layout: Layout, device: torch.device, snapshot: Snapshot) -> str | None:
    """Why the model cannot be captured."""
    if layout.custom_modules:
        path, module = layout.custom_modules[0]
        return f"{path} is a {name_of(type(module))}, which may compute something else in the next call"
    for tensor in snapshot.tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"weights of type {type(tensor).__name__}"
        if tensor.device != device:
            return f"weights on {tensor.device} and tokens on {device}"
    return None
