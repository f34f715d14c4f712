"""The table of what can be patched: original class -> module of its patched class."""

import importlib
import os

from embedfuse.compatibility import explained

_BERT = "transformers.models.bert.modeling_bert"
_ROBERTA = "transformers.models.roberta.modeling_roberta"
_XLM_ROBERTA = "transformers.models.xlm_roberta.modeling_xlm_roberta"
_MODELS = "transformers.models"
# Original class -> module with the patched class, which has the same name.
PATCHED_CLASSES = {
    f"{_BERT}.BertModel": "embedfuse.patching.models.bert",
    f"{_BERT}.BertForSequenceClassification": "embedfuse.patching.models.bert",
    f"{_ROBERTA}.RobertaModel": "embedfuse.patching.models.roberta",
    f"{_ROBERTA}.RobertaForSequenceClassification": "embedfuse.patching.models.roberta",
    f"{_XLM_ROBERTA}.XLMRobertaModel": "embedfuse.patching.models.xlm_roberta",
    f"{_XLM_ROBERTA}.XLMRobertaForSequenceClassification": "embedfuse.patching.models.xlm_roberta",
    f"{_MODELS}.mistral.modeling_mistral.MistralModel": "embedfuse.patching.models.decoders",
    f"{_MODELS}.llama.modeling_llama.LlamaModel": "embedfuse.patching.models.decoders",
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2Model": "embedfuse.patching.models.decoders",
    f"{_MODELS}.qwen3.modeling_qwen3.Qwen3Model": "embedfuse.patching.models.decoders",
    "sentence_transformers.sentence_transformer.model.SentenceTransformer": (
        "embedfuse.integrations.sentence_transformers.model"
    ),
    "sentence_transformers.multi_vector_encoder.model.MultiVectorEncoder": (
        "embedfuse.integrations.sentence_transformers.multi_vector"
    ),
    "pylate.models.colbert.ColBERT": "embedfuse.integrations.pylate.model",
    "peft.peft_model.PeftModel": "embedfuse.integrations.peft",
    "peft.peft_model.PeftModelForFeatureExtraction": "embedfuse.integrations.peft",
    "FlagEmbedding.inference.embedder.encoder_only.m3.M3Embedder": (
        "embedfuse.integrations.flag_embedding.m3"
    ),
    "FlagEmbedding.inference.embedder.decoder_only.base.BaseLLMEmbedder": (
        "embedfuse.integrations.flag_embedding.llm"
    ),
    "FlagEmbedding.inference.reranker.encoder_only.base.BaseReranker": (
        "embedfuse.integrations.flag_embedding.reranker"
    ),
    "sentence_transformers.cross_encoder.model.CrossEncoder": (
        "embedfuse.integrations.sentence_transformers.cross_encoder"
    ),
}


def patched_class(original: type) -> type | None:
    """The class that patches objects of exactly this class; None when there is none."""
    path = f"{original.__module__}.{original.__qualname__}"
    if path not in PATCHED_CLASSES:
        return None
    with explained(path.partition(".")[0]):
        return getattr(importlib.import_module(PATCHED_CLASSES[path]), original.__name__)


def patched_class_of(model: object) -> type:
    """The class that patches this object. TypeError, naming the accepted kinds, when there is none."""
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        raise TypeError(
            f"model: the name {name!r}; accepted is a loaded model. embedfuse.Embedder({name!r}) loads one "
            "and patches it"
        )
    original = getattr(type(model), "original", type(model))
    found = patched_class(original)
    if found is None:
        kinds = ", ".join(path.rsplit(".", 1)[1] for path in PATCHED_CLASSES)
        kind = f"{original.__module__}.{original.__qualname__}"
        raise TypeError(f"model: {kind}; accepted are {kinds}")
    return found
