"""Qwen2: biases on query, key and value; sliding windows by layer."""

from transformers.models.qwen2 import modeling_qwen2

from embedfuse.patching.decoder import PackedDecoder


class Qwen2Model(PackedDecoder, modeling_qwen2.Qwen2Model):
    original = modeling_qwen2.Qwen2Model
