"""XLM-RoBERTa (BGE-M3, multilingual E5, bge-reranker-v2-m3): RoBERTa's layers and positions."""

from transformers.models.xlm_roberta import modeling_xlm_roberta

from embedfuse.patching.forward.classifier import PackedClassifier
from embedfuse.patching.models.roberta import RobertaPositions


class XLMRobertaModel(RobertaPositions, modeling_xlm_roberta.XLMRobertaModel):
    original = modeling_xlm_roberta.XLMRobertaModel


class XLMRobertaForSequenceClassification(
    PackedClassifier, RobertaPositions, modeling_xlm_roberta.XLMRobertaForSequenceClassification
):
    original = modeling_xlm_roberta.XLMRobertaForSequenceClassification
    first_row_reader = "classifier"
