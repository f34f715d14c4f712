"""Decoders: Mistral (E5-mistral), LLaMA, Qwen2 and Qwen3 (Qwen3-Embedding).

Qwen2 has biases on query, key and value, Qwen3 norms of query and key per head; both have sliding windows by
layer.
"""

from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from embedfuse.patching.forward.decoder import PackedDecoder


class MistralModel(PackedDecoder, modeling_mistral.MistralModel):
    original = modeling_mistral.MistralModel

    def window(self, layer: int) -> int | None:
        return self.config.sliding_window


class LlamaModel(PackedDecoder, modeling_llama.LlamaModel):
    original = modeling_llama.LlamaModel

    def window(self, layer: int) -> int | None:
        return None


class Qwen2Model(PackedDecoder, modeling_qwen2.Qwen2Model):
    original = modeling_qwen2.Qwen2Model


class Qwen3Model(PackedDecoder, modeling_qwen3.Qwen3Model):
    original = modeling_qwen3.Qwen3Model
