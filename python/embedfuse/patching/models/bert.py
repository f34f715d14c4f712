"""BERT: positions are the columns of the padded batch."""

from torch import Tensor, nn
from transformers.models.bert import modeling_bert

from embedfuse.packing import Packed
from embedfuse.patching.forward.classifier import PackedClassifier
from embedfuse.patching.forward.encoder import PackedEncoder


class BertPositions(PackedEncoder):
    def position_ids(self, input_ids: Tensor, packed: Packed) -> Tensor:
        return packed.columns

    @staticmethod
    def first_position(embeddings: nn.Module) -> int:
        return 0

    @staticmethod
    def positions_used(packed: Packed) -> int:
        return packed.max_seqlen if packed.index is None else packed.shape[1]


class BertModel(BertPositions, modeling_bert.BertModel):
    original = modeling_bert.BertModel


class BertForSequenceClassification(
    PackedClassifier, BertPositions, modeling_bert.BertForSequenceClassification
):
    original = modeling_bert.BertForSequenceClassification
    first_row_reader = "bert.pooler"
