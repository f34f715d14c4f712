"""Mistral (E5-mistral): one sliding window for all layers, or none."""

from transformers.models.mistral import modeling_mistral

from embedfuse.patching.decoder import PackedDecoder


class MistralModel(PackedDecoder, modeling_mistral.MistralModel):
    original = modeling_mistral.MistralModel

    def window(self, layer: int) -> int | None:
        return self.config.sliding_window
