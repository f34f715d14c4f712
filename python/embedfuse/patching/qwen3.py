"""Qwen3 (Qwen3-Embedding): query and key normalised per head; sliding windows by layer."""

from transformers.models.qwen3 import modeling_qwen3

from embedfuse.patching.decoder import PackedDecoder


class Qwen3Model(PackedDecoder, modeling_qwen3.Qwen3Model):
    original = modeling_qwen3.Qwen3Model
