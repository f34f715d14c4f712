"""benchmarks.models.checkpoints writes E5-mistral as it is published, and all libraries read it alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, MistralConfig, MistralModel

import embedfuse
from benchmarks.models.checkpoints import E5_MISTRAL
from embedfuse.pipeline.checkpoint import read_preset
from tests.integrations.flag import TEXTS, counted

st = pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def tokenizer(e5_mistral_folder):
    return AutoTokenizer.from_pretrained(e5_mistral_folder)


def test_the_true_sizes():
    with torch.device("meta"):
        model = MistralModel(MistralConfig(**E5_MISTRAL, num_hidden_layers=32))
    assert sum(p.numel() for p in model.parameters()) == 7_110_660_096  # as published
    assert model.config.head_dim == 128
    assert model.config.rope_parameters["rope_theta"] == 10000.0


def test_config_and_weights(e5_mistral_folder):
    config = AutoConfig.from_pretrained(e5_mistral_folder)
    assert (config.num_hidden_layers, config.sliding_window, config.dtype) == (
        3,
        24,
        torch.bfloat16,
    )
    assert config.rope_parameters["rope_theta"] == 10000.0
    model = AutoModel.from_pretrained(e5_mistral_folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_tokenizer(tokenizer):
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == 2000
    ids = tokenizer("open a file: é 🎉")["input_ids"]
    assert ids[0] == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "<s> open a file: é 🎉</s>"
    assert tokenizer("word " * 99, truncation=True, max_length=7)["input_ids"][-1] == 2
    padded = tokenizer(["a", "open a file"], padding=True)
    assert padded["input_ids"][0][:1] == [2]
    assert padded["attention_mask"][0][:1] == [0]


def test_settings(e5_mistral_folder):
    preset = read_preset(e5_mistral_folder, {}, None)
    assert (preset.pooling, preset.normalize, preset.max_length) == ("last", True, 4096)
    modules = json.loads((Path(e5_mistral_folder) / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]


def test_sentence_transformers(e5_mistral_folder, tokenizer):
    model = st.SentenceTransformer(
        e5_mistral_folder, device="cpu", model_kwargs={"dtype": torch.float32}
    )
    expected = model.encode(TEXTS, batch_size=8)
    ids = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        last = model[0].model(**ids).last_hidden_state[0, -1]
    wanted = torch.nn.functional.normalize(last, dim=0)
    np.testing.assert_allclose(expected[0], wanted, rtol=0, atol=1e-5)
    # With random weights the vectors of different texts differ too.
    likeness = expected @ expected.T - np.eye(len(TEXTS))
    assert likeness.max(1).min() < 0.95
    assert likeness.mean() < 0.5
    report = embedfuse.patch(model)
    assert "last pooling and normalisation in one kernel" in report.fused
    with counted(model[0].model) as tokens:
        np.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=1e-5)
    assert sum(tokens) == sum(map(len, tokenizer(TEXTS)["input_ids"]))
    assert not report.original_calls
