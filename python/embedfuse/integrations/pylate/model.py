"""PyLate's ColBERT: its transformer without padding, similarity by ops.maxsim."""

from pylate.models import ColBERT as _ORIGINAL
from sentence_transformers.models import Transformer
from torch import Tensor, nn

from embedfuse.integrations.late_interaction import LateInteractionModel
from embedfuse.integrations.pylate.scores import colbert_scores, colbert_scores_pairwise


class ColBERT(LateInteractionModel, _ORIGINAL):
    original = _ORIGINAL

    @classmethod
    def inner_model(cls, model: _ORIGINAL) -> nn.Module:
        if type(model[0]) is not Transformer:
            raise TypeError(
                f"model: its first module is {type(model[0]).__name__}; accepted is Transformer"
            )
        return model[0].auto_model

    @classmethod
    def probe(cls, model: _ORIGINAL, texts: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        longest = model.max_seq_length  # every encode sets it
        call = {"convert_to_tensor": True, "show_progress_bar": False}
        vectors = [model.encode(texts, is_query=is_query, **call) for is_query in (True, False)]
        model.max_seq_length = longest
        return tuple(vectors)

    def scores_padding(self, features: dict) -> bool:
        # Nothing marks queries, but expanded queries are all of one width.
        if not self.do_query_expansion or features["input_ids"].shape[1] != self.query_length:
            return False
        return not features["attention_mask"].all()

    @property
    def similarity(self):
        return colbert_scores

    @property
    def similarity_pairwise(self):
        return colbert_scores_pairwise
