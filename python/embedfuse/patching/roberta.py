"""RoBERTa: positions count the tokens that are not the padding token, from padding_idx + 1 on."""

from torch import Tensor, nn
from transformers.models.roberta import modeling_roberta

from embedfuse.packing import Packed
from embedfuse.patching.encoder import PackedEncoder


class RobertaPositions(PackedEncoder):
    def position_ids(self, input_ids: Tensor) -> Tensor:
        padding_idx = self.embeddings.padding_idx
        tokens = input_ids != padding_idx
        # A padding token inside the text keeps position padding_idx, as in the original.
        return tokens.cumsum(1) * tokens + padding_idx

    @staticmethod
    def first_position(embeddings: nn.Module) -> int:
        return embeddings.padding_idx + 1

    @staticmethod
    def positions_used(packed: Packed) -> int:
        return packed.max_seqlen


class RobertaModel(RobertaPositions, modeling_roberta.RobertaModel):
    original = modeling_roberta.RobertaModel
