"""What the tests of FlagLLMModel share: two small checkpoints, and a comparison of embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from tests.integrations.flag import DOCSTRINGS


def make_qwen2(folder: Path) -> str:
    """Qwen2 with windows in some layers; its tokenizer has no BOS and ends texts with <|endoftext|>."""
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=600,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        max_position_embeddings=1024,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        initializer_range=0.2,
    )
    model = Qwen2Model(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DOCSTRINGS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", padding_side="left"
    ).save_pretrained(folder)
    return str(folder)


def load(folder: str, **settings):
    library = pytest.importorskip("FlagEmbedding")
    return library.FlagLLMModel(folder, **{"use_fp16": False, "devices": "cpu", **settings})


def assert_same(found, expected, atol: float = 1e-4) -> None:
    """Equal type, dtype and shape; close values."""
    assert type(found) is type(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    found, expected = (torch.as_tensor(x).double().numpy() for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
