"""XLM-RoBERTa (BGE-M3, multilingual E5): RoBERTa's layers and positions."""

from transformers.models.xlm_roberta import modeling_xlm_roberta

from embedfuse.patching.roberta import RobertaPositions


class XLMRobertaModel(RobertaPositions, modeling_xlm_roberta.XLMRobertaModel):
    original = modeling_xlm_roberta.XLMRobertaModel
