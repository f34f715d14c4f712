"""MultiVectorEncoder: its transformer without padding, similarity by ops.maxsim."""

import functools

from sentence_transformers import MultiVectorEncoder as _ORIGINAL
from torch import Tensor, nn

from embedfuse.integrations.late_interaction import LateInteractionModel
from embedfuse.integrations.sentence_transformers.inference import QuickInference
from embedfuse.integrations.sentence_transformers.model import transformers_model
from embedfuse.integrations.sentence_transformers.scoring import maxsim, maxsim_pairwise


class MultiVectorEncoder(QuickInference, LateInteractionModel, _ORIGINAL):
    original = _ORIGINAL

    @classmethod
    def inner_model(cls, model: _ORIGINAL) -> nn.Module:
        return transformers_model(model)

    @classmethod
    def probe(cls, model: _ORIGINAL, texts: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        call = {"show_progress_bar": False}
        return model.encode_query(texts, **call), model.encode_document(texts, **call)

    def scores_padding(self, features: dict) -> bool:
        expansion = features.get("query_expansion_positions")
        return expansion is not None and bool((expansion & (features["attention_mask"] == 0)).any())

    @functools.wraps(_ORIGINAL.similarity)
    def similarity(self, embeddings1, embeddings2, **kwargs):
        return maxsim(embeddings1, embeddings2, **self._mean_or_sum(kwargs))

    @functools.wraps(_ORIGINAL.similarity_pairwise)
    def similarity_pairwise(self, embeddings1, embeddings2, **kwargs):
        return maxsim_pairwise(embeddings1, embeddings2, **self._mean_or_sum(kwargs))

    def _mean_or_sum(self, kwargs: dict) -> dict:
        return {"length_normalize": self.similarity_fn_name == "meanmaxsim"} | kwargs
