"""What BERT, RoBERTa and XLM-RoBERTa share: module names, embeddings, outputs."""

import sys
from abc import abstractmethod

from torch import Tensor, nn

from embedfuse.nn.encoder import EncoderLayer, encode, layer_norm
from embedfuse.nn.linear import FusedLinear
from embedfuse.packing import Packed
from embedfuse.patching.check import Probe
from embedfuse.patching.engine import PackedModel
from embedfuse.patching.plan import Plan

# All compute softmax(q k^T scale) v; a name registered by somebody else may compute anything.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


class PackedEncoder(PackedModel):
    @classmethod
    def probe(cls, model: nn.Module) -> Probe:
        tables = model.embeddings
        room = tables.position_embeddings.num_embeddings - cls.first_position(tables)
        padding_idx = model.config.pad_token_id or 0
        words = tables.word_embeddings.num_embeddings
        return Probe.random(words, padding_idx, room, model.device)

    def make_plan(self) -> Plan:
        if refusal := self._refusal():
            return Plan(self, refusal=refusal)
        return Plan(self, [read_layer(block) for block in self.encoder.layer])

    def _refusal(self) -> str | None:
        config = self.config
        if config.is_decoder or config.add_cross_attention or getattr(config, "is_causal", False):
            return "the model is configured as a decoder"
        if getattr(config, "position_embedding_type", "absolute") != "absolute":
            return f"config.position_embedding_type is {config.position_embedding_type!r}"
        if config._attn_implementation not in _ATTENTIONS:
            return f"attention {config._attn_implementation!r} is not one of transformers' own"
        return _not_stock(
            {"embeddings": self.embeddings, "encoder": self.encoder}, self.original.__module__
        ) or next(filter(None, map(self._block_refusal, range(len(self.encoder.layer)))), None)

    def _block_refusal(self, i: int) -> str | None:
        block, stock, path = self.encoder.layer[i], self.original.__module__, f"encoder.layer.{i}"
        if why := _not_stock({path: block}, stock):
            return why
        children = {f"{path}.{name}": child for name, child in block.named_children()}
        if why := _not_stock(children, stock):
            return why
        inner = block.attention.named_children()
        return _not_stock({f"{path}.attention.{name}": child for name, child in inner}, stock)

    def misfit(self, packed: Packed) -> str | None:
        if self.pooler is not None and packed.starts_padded:
            return "left padding: the model's pooler reads column 0, where a row has no token"
        return None

    @abstractmethod
    def position_ids(self, input_ids: Tensor) -> Tensor:
        """(batch, length) as the original numbers them."""

    @staticmethod
    @abstractmethod
    def first_position(embeddings: nn.Module) -> int:
        """The position id of a row's first token."""

    @staticmethod
    @abstractmethod
    def positions_used(packed: Packed) -> int:
        """How many position ids the longest row runs through."""

    def check_ids(self, call: dict, packed: Packed) -> None:
        input_ids = call["input_ids"]
        places = self.embeddings.position_embeddings.num_embeddings
        last = self.first_position(self.embeddings) + self.positions_used(packed) - 1
        if last >= places and call.get("position_ids") is None:
            raise ValueError(
                f"input_ids: length {packed.shape[1]} (longest sequence {packed.max_seqlen}) needs "
                f"position {last}; the position table ends at {places - 1}"
            )
        if input_ids.is_cpu and input_ids.numel():  # on a GPU the look would wait for it
            low, high = input_ids.aminmax()
            words = self.embeddings.word_embeddings.num_embeddings
            if low < 0 or high >= words:
                bad = int(low if low < 0 else high)
                raise IndexError(f"input_ids: token {bad}; accepted are 0 to {words - 1}")

    def run_packed(self, plan: Plan, packed: Packed, call: dict) -> Tensor:
        return encode(plan.layers, self._embed(packed, call), packed)

    def _embed(self, packed: Packed, call: dict) -> Tensor:
        tables, input_ids = self.embeddings, call["input_ids"]
        positions = call.get("position_ids")
        positions = self.position_ids(input_ids) if positions is None else positions
        types = call.get("token_type_ids")
        # The order of the sums is the original's.
        x = tables.word_embeddings(packed.pack(input_ids))
        if types is None:
            x = x + tables.token_type_embeddings.weight[0]
        else:
            x = x + tables.token_type_embeddings(packed.pack(types))
        x = x + tables.position_embeddings(packed.pack(positions.expand_as(input_ids)))
        return tables.dropout(layer_norm(tables.LayerNorm, x))

    def make_output(self, states: Tensor, return_dict: bool):
        pooled = self.pooler(states) if self.pooler is not None else None
        modeling = sys.modules[self.original.__module__]
        output = modeling.BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=states, pooler_output=pooled
        )
        return output if return_dict else output.to_tuple()


def _not_stock(modules: dict[str, nn.Module], stock: str) -> str | None:
    """The first module that transformers' file `stock` does not define."""
    for path, module in modules.items():
        kind = type(module)
        if kind.__module__ != stock:
            return f"{path} is a {kind.__module__}.{kind.__qualname__}, not one of {stock}"
    return None


def read_layer(block: nn.Module) -> EncoderLayer:
    attention, output = block.attention.self, block.attention.output
    return EncoderLayer(
        block=block,
        qkv=FusedLinear((attention.query, attention.key, attention.value)),
        heads=attention.num_attention_heads,
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
