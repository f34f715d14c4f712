"""What BERT, RoBERTa and XLM-RoBERTa share: module names, embeddings, outputs."""

import sys
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from embedfuse.nn.encoder import EncoderLayer, encode, layer_norm
from embedfuse.packing import Packed
from embedfuse.patching.check import Probe, check_ids, table_size
from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.forward.tokens import Tokens
from embedfuse.patching.layout import Layout, not_stock

# Buffers of the embeddings as transformers makes them; another one is 0.
_BUFFERS = {
    "position_ids": lambda ids: torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
}


class PackedEncoder(PackedModel):
    """Its layers are those of transformers' `base_model`: the model itself, or the one under its head."""

    @classmethod
    def probe(cls, model: nn.Module) -> Probe:
        padding_idx = model.config.pad_token_id or 0
        words = table_size(model.base_model.embeddings.word_embeddings) or model.config.vocab_size
        return Probe.random(words, padding_idx, model.longest_sequence(), model.device)

    def longest_sequence(self) -> int:
        """Tokens that the position table has room for."""
        return self._places() - self.first_position(self.base_model.embeddings)

    def _places(self) -> int:
        table = self.base_model.embeddings.position_embeddings
        return table_size(table) or self.config.max_position_embeddings

    def takes_rows(self, path: str) -> bool:
        own = "" if self.base_model is self else f"{self.base_model_prefix}."
        return path.startswith((f"{own}embeddings.", f"{own}encoder."))

    def read_layers(self) -> list[EncoderLayer]:
        return [read_layer(block) for block in self.base_model.encoder.layer]

    def buffers_read(self) -> tuple[Tensor, ...]:
        return tuple(self.base_model.embeddings.buffers(recurse=False))

    def refusal(self) -> str | None:
        config = self.config
        if config.is_decoder or config.add_cross_attention or getattr(config, "is_causal", False):
            return "the model is configured as a decoder"
        if getattr(config, "position_embedding_type", "absolute") != "absolute":
            return f"config.position_embedding_type is {config.position_embedding_type!r}"
        if reason := not_stock(self, self.assumed()):
            return reason
        for i, block in enumerate(self.base_model.encoder.layer):
            if block.attention.is_cross_attention or block.attention.self.is_causal:
                return f"encoder.layer.{i} is configured as a decoder's"
        for name, buffer in self.base_model.embeddings.named_buffers(recurse=False):
            made = _BUFFERS.get(name, torch.zeros_like)(buffer)
            if not (buffer.is_meta or torch.equal(buffer, made)):
                return f"embeddings.{name} is not as the model was made"
        return None

    def assumed(self) -> Iterator[tuple[str, nn.Module]]:
        """Path and module of all whose class has to be transformers' own, from the outside in."""
        base = self.base_model
        own = "" if base is self else f"{self.base_model_prefix}."
        if own:
            yield own[:-1], base
        yield f"{own}embeddings", base.embeddings
        yield f"{own}encoder", base.encoder
        for i, block in enumerate(base.encoder.layer):
            path = f"{own}encoder.layer.{i}"
            yield path, block
            for name, child in block.named_children():
                yield f"{path}.{name}", child
            for name, child in block.attention.named_children():
                yield f"{path}.attention.{name}", child

    def misfit(self, packed: Packed) -> str | None:
        if self.base_model.pooler is not None and packed.starts_padded:
            return "left padding: the model's pooler reads column 0, where a row has no token"
        return None

    def replays(self, packed: Packed, bucket_tokens: int) -> bool:
        # BERT counts padding on the left; the tokens of a bucket that are left free need positions too.
        free = bucket_tokens - packed.tokens
        return not packed.starts_padded and free <= self.longest_sequence()

    @abstractmethod
    def position_ids(self, input_ids: Tensor, packed: Packed) -> Tensor:
        """(tokens,) as the original numbers them."""

    @staticmethod
    @abstractmethod
    def first_position(embeddings: nn.Module) -> int:
        """The position id of a row's first token."""

    @staticmethod
    @abstractmethod
    def positions_used(packed: Packed) -> int:
        """How many position ids the longest row runs through."""

    def check_tokens(self, tokens: Tokens, packed: Packed) -> None:
        tables, places = self.base_model.embeddings, self._places()
        given = tokens.position_ids
        if given is None:
            last = self.first_position(tables) + self.positions_used(packed) - 1
        else:  # on a GPU the look would wait for it
            last = int(given.max()) if given.is_cpu and given.numel() else 0
        if last >= places:
            raise ValueError(
                f"input_ids: length {packed.shape[1]} (longest sequence {packed.max_seqlen}) needs "
                f"position {last}; the position table ends at {places - 1}"
            )
        check_ids(tokens.input_ids, packed, table_size(tables.word_embeddings))

    def run_packed(
        self, layout: Layout, packed: Packed, tokens: Tokens, rows: Tensor | None
    ) -> Tensor:
        return encode(layout.layers, self._embed(packed, tokens), packed, rows)

    def _embed(self, packed: Packed, tokens: Tokens) -> Tensor:
        tables, input_ids = self.base_model.embeddings, tokens.input_ids
        positions, types = tokens.position_ids, tokens.token_type_ids
        if positions is None:
            positions = self.position_ids(input_ids, packed)
        # The order of the sums is the original's.
        x = tables.word_embeddings(input_ids)
        table = tables.token_type_embeddings
        if types is None and table_size(table) and not torch.is_grad_enabled():
            x = x + table.weight[0]
        else:
            x = x + table(torch.zeros_like(input_ids) if types is None else types)
        x = x + tables.position_embeddings(positions)
        return tables.dropout(layer_norm(tables.LayerNorm, x))

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
