"""RoBERTa: positions count the tokens that are not the padding token, from padding_idx + 1 on."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.roberta import modeling_roberta

from embedfuse.packing import Packed
from embedfuse.patching.forward.classifier import PackedClassifier
from embedfuse.patching.forward.encoder import PackedEncoder
from embedfuse.patching.forward.tokens import Tokens


class RobertaPositions(PackedEncoder):
    def tokens_of(self, call: dict, packed: Packed) -> Tokens:
        tokens = super().tokens_of(call, packed)
        if tokens.position_ids is not None or not packed.starts_padded:
            return tokens
        # Ids that the mask leaves out before a text count too, unless they are the padding token.
        padding_idx = self.base_model.embeddings.padding_idx
        counted = call["input_ids"] != padding_idx
        positions = packed.pack(counted.cumsum(1) * counted + padding_idx)
        return replace(tokens, position_ids=positions)

    def position_ids(self, input_ids: Tensor, packed: Packed) -> Tensor:
        padding_idx = self.base_model.embeddings.padding_idx
        tokens = input_ids != padding_idx
        count = F.pad(tokens.cumsum(0), (1, 0))
        before = count[packed.cu_seqlens[:-1].long()][packed.sequence]
        # A padding token inside the text keeps position padding_idx, as in the original.
        return (count[1:] - before) * tokens + padding_idx

    @staticmethod
    def first_position(embeddings: nn.Module) -> int:
        return embeddings.padding_idx + 1

    @staticmethod
    def uncounted_id(embeddings: nn.Module) -> int | None:
        return embeddings.padding_idx

    @staticmethod
    def positions_used(packed: Packed) -> int:
        return packed.max_seqlen


class RobertaModel(RobertaPositions, modeling_roberta.RobertaModel):
    original = modeling_roberta.RobertaModel


class RobertaForSequenceClassification(
    PackedClassifier, RobertaPositions, modeling_roberta.RobertaForSequenceClassification
):
    original = modeling_roberta.RobertaForSequenceClassification
    first_row_reader = "classifier"
