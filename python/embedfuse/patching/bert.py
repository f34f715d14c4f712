"""BERT: positions are the columns of the padded batch."""

import torch
from torch import Tensor, nn
from transformers.models.bert import modeling_bert

from embedfuse.packing import Packed
from embedfuse.patching.encoder import PackedEncoder


class BertModel(PackedEncoder, modeling_bert.BertModel):
    original = modeling_bert.BertModel

    def position_ids(self, input_ids: Tensor) -> Tensor:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]

    @staticmethod
    def first_position(embeddings: nn.Module) -> int:
        return 0

    @staticmethod
    def positions_used(packed: Packed) -> int:
        return packed.shape[1]
