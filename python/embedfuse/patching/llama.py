"""LLaMA: every layer sees all that came before."""

from transformers.models.llama import modeling_llama

from embedfuse.patching.decoder import PackedDecoder


class LlamaModel(PackedDecoder, modeling_llama.LlamaModel):
    original = modeling_llama.LlamaModel

    def window(self, layer: int) -> int | None:
        return None
