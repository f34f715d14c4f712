"""Small decoders of each family with random weights, and batches of texts that begin with the same tokens."""

import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

import embedfuse
from tests.patching.encoders import VOCABULARY

TIGHT = {"rtol": 0, "atol": 2e-5}
BY_LAYER = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
FAMILIES = {
    "mistral": (MistralConfig, MistralModel, {"sliding_window": 6}),
    "llama": (LlamaConfig, LlamaModel, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, Qwen2Model, BY_LAYER),
    "qwen3": (Qwen3Config, Qwen3Model, {**BY_LAYER, "head_dim": 16}),
}


def make_model(family: str, **changes):
    torch.manual_seed(0)
    config, model, of_family = FAMILIES[family]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "max_position_embeddings": 70,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # large enough that a wrong position or mask shows
    }
    model = model(config(**{**sizes, **of_family, **changes})).eval()
    for name, p in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model


def open_mask(batch, dtype) -> torch.Tensor:
    """Every token sees all that are no padding; to add to scores."""
    seen = batch["attention_mask"][:, None, None, :].bool()
    seen = seen.expand(-1, 1, seen.shape[-1], -1)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


INSTRUCTION = list(range(5, 32))  # 27 tokens


def texts(*tails: list[int]) -> list[list[int]]:
    return [INSTRUCTION + tail for tail in tails]


DEEP = [
    *texts([40, 41, 42, 43], [40, 41, 42, 44, 45], [40, 41], [40, 41], [50], [], [60, 61, 62]),
    [99],
    [5, 6, 7],
    [100, 101, 102, 103],
]


def batch_of(sequences: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        place = slice(len(tokens)) if side == "right" else slice(length - len(tokens), length)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def embed(model, sequences, side="right", pooling="last"):
    with torch.no_grad():
        return embedfuse.embed(model, **batch_of(sequences, side), pooling=pooling)
