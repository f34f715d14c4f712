"""What BERT, RoBERTa and XLM-RoBERTa share: module names, embeddings, outputs."""

import sys
from abc import abstractmethod
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from embedfuse.nn.encoder import EncoderEmbeddings, EncoderLayer, encode, norm_of_sum, record
from embedfuse.nn.linear import is_inference
from embedfuse.nn.programs import Programs
from embedfuse.packing import Packed
from embedfuse.patching.check import Probe
from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.forward.tokens import Batch, check_ids, table_size
from embedfuse.patching.layout import not_stock

# Buffers of the embeddings as transformers makes them; any other is 0.
_BUFFERS = {
    "position_ids": lambda ids: torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
}


class PackedEncoder(PackedModel):
    """Its layers are those of transformers' `base_model`: the model itself, or the one under its head."""

    @classmethod
    def probe(cls, model: nn.Module) -> Probe:
        padding_idx = model.config.pad_token_id or 0
        words = model.base_model.embeddings.word_embeddings
        vocabulary = table_size(words) or model.config.vocab_size
        return Probe.random(vocabulary, padding_idx, model.longest_sequence(), model.device)

    def longest_sequence(self) -> int:
        return self._positions() - self.first_position(self.base_model.embeddings)

    def _positions(self) -> int:
        table = self.base_model.embeddings.position_embeddings
        return table_size(table) or self.config.max_position_embeddings

    def _base_prefix(self) -> str:
        return "" if self.base_model is self else f"{self.base_model_prefix}."

    def runs_packed(self, path: str) -> bool:
        prefix = self._base_prefix()
        return path.startswith((f"{prefix}embeddings.", f"{prefix}encoder."))

    def read_layers(self) -> list[EncoderLayer]:
        return [read_layer(block) for block in self.base_model.encoder.layer]

    def buffers_read(self) -> tuple[Tensor, ...]:
        return tuple(self.base_model.embeddings.buffers(recurse=False))

    def model_refusal(self) -> str | None:
        config = self.config
        if config.is_decoder or config.add_cross_attention or getattr(config, "is_causal", False):
            return "the model is configured as a decoder"
        if getattr(config, "position_embedding_type", "absolute") != "absolute":
            return f"config.position_embedding_type is {config.position_embedding_type!r}"
        if reason := not_stock(self, self.stock_modules()):
            return reason
        for i, block in enumerate(self.base_model.encoder.layer):
            if block.attention.is_cross_attention or block.attention.self.is_causal:
                return f"encoder.layer.{i} is configured as a decoder's"
        for name, buffer in self.base_model.embeddings.named_buffers(recurse=False):
            made = _BUFFERS.get(name, torch.zeros_like)(buffer)
            if not (buffer.is_meta or torch.equal(buffer, made)):
                return f"embeddings.{name} is not as the model was made"
        return None

    def stock_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Path and module of all whose class has to be transformers' own, outer ones first."""
        base, prefix = self.base_model, self._base_prefix()
        if prefix:
            yield self.base_model_prefix, base
        yield f"{prefix}embeddings", base.embeddings
        yield f"{prefix}encoder", base.encoder
        for i, block in enumerate(base.encoder.layer):
            path = f"{prefix}encoder.layer.{i}"
            yield path, block
            for name, child in block.named_children():
                yield f"{path}.{name}", child
            for name, child in block.attention.named_children():
                yield f"{path}.attention.{name}", child

    def batch_refusal(self, call: dict, packed: Packed) -> str | None:
        if self.base_model.pooler is not None and packed.starts_padded:
            return "left padding: the model's pooler reads column 0, where a row has no token"
        return None

    def replays(self, packed: Packed, bucket_tokens: int) -> bool:
        # BERT counts padding on the left; the unused tokens of a bucket need positions too.
        unused = bucket_tokens - packed.tokens
        return not packed.starts_padded and unused <= self.longest_sequence()

    @abstractmethod
    def position_ids(self, input_ids: Tensor, packed: Packed) -> Tensor:
        """(tokens,) as the original numbers them."""

    @staticmethod
    @abstractmethod
    def first_position(embeddings: nn.Module) -> int:
        """The position id of a row's first token."""

    @staticmethod
    def uncounted_id(embeddings: nn.Module) -> int | None:
        """The token id that positions leave out; None where every token counts."""
        return None

    @staticmethod
    @abstractmethod
    def positions_used(packed: Packed) -> int:
        """How many position ids the longest row uses."""

    def check_tokens(self, batch: Batch) -> None:
        tables = self.base_model.embeddings
        packed, given = batch.packed, batch.tokens.position_ids
        if given is None:
            last = self.first_position(tables) + self.positions_used(packed) - 1
        else:  # reading them from a GPU would wait for it
            last = int(given.max()) if given.is_cpu and given.numel() else 0
        positions = self._positions()
        if last >= positions:
            raise ValueError(
                f"input_ids: length {packed.shape[1]} (longest sequence {packed.max_seqlen}) needs "
                f"position {last}; the position table ends at {positions - 1}"
            )
        check_ids(batch, table_size(tables.word_embeddings))

    def run_layers(self, batch: Batch, rows: Tensor | None) -> Tensor:
        packed, tokens, layout = batch.packed, batch.tokens, batch.layout
        words = self.base_model.embeddings.word_embeddings
        program = None
        if layout.programs is not None and table_size(words):
            program = layout.programs.for_call(words.weight, packed.tokens, rows is not None)
        elif layout.programs is not None:
            kind = type(words).__name__
            self._embedfuse.report.one_call(f"word_embeddings is a {kind}, or has a max_norm")
        positions = tokens.position_ids
        counted = program is None or (program.counts_positions and not packed.starts_padded)
        if positions is None and not counted:
            positions = self.position_ids(tokens.input_ids, packed)
        ids = tokens.input_ids, tokens.token_type_ids, positions
        if program is not None and program.takes((), ids):
            return program.run((), packed, rows, ids)
        return encode(layout.layers, self._embed(batch), packed, rows)

    def make_programs(self, layers: list[EncoderLayer]) -> Programs:
        tables = self.base_model.embeddings
        embeddings = EncoderEmbeddings(
            words=tables.word_embeddings,
            types=tables.token_type_embeddings,
            positions=tables.position_embeddings,
            norm=tables.LayerNorm,
            dropout=tables.dropout,
            padding_idx=self.uncounted_id(tables),
        )
        return Programs(partial(record, embeddings, layers), self._embedfuse.report.one_call)

    def _embed(self, batch: Batch) -> Tensor:
        tables, tokens = self.base_model.embeddings, batch.tokens
        input_ids, types, positions = tokens.input_ids, tokens.token_type_ids, tokens.position_ids
        if positions is None:
            positions = self.position_ids(input_ids, batch.packed)
        # Summed in the original's order.
        x = tables.word_embeddings(input_ids)
        table = tables.token_type_embeddings
        if types is None and table_size(table) and not torch.is_grad_enabled():
            x = x + table.weight[0]
        else:
            x = x + table(torch.zeros_like(input_ids) if types is None else types)
        positions = tables.position_embeddings(positions)
        return tables.dropout(norm_of_sum(tables.LayerNorm, x, positions, is_inference(x)))

    def make_output(self, states: Tensor, return_dict: bool):
        pooler = self.base_model.pooler
        pooled = pooler(states) if pooler is not None else None
        modeling = sys.modules[self.original.__module__]
        output = modeling.BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=states, pooler_output=pooled
        )
        return output if return_dict else output.to_tuple()


def read_layer(block: nn.Module) -> EncoderLayer:
    attention, output = block.attention.self, block.attention.output
    return EncoderLayer(
        block=block,
        qkv=(attention.query, attention.key, attention.value),
        head_dim=attention.attention_head_size,
        scale=attention.scaling,
        attention=attention,
        out=output.dense,
        dropout1=output.dropout,
        norm1=output.LayerNorm,
        up=block.intermediate.dense,
        activation=block.intermediate.intermediate_act_fn,
        down=block.output.dense,
        dropout2=block.output.dropout,
        norm2=block.output.LayerNorm,
    )
