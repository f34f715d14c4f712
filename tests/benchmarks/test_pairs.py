"""The model pairs of the GPU benchmarks, small and on the CPU: all libraries give the same vectors."""

import pytest
import torch
from transformers import BertConfig

from benchmarks.models import checkpoints, pairs, workloads
from benchmarks.models.pairs import ModelPair

SMALL = {
    "BGE-M3": (
        lambda: checkpoints.bge_m3_config(checkpoints.SMALL),
        lambda folder: checkpoints.write_bge_m3_files(folder, checkpoints.SMALL),
        "cls",
    ),
    "E5-mistral-7B": (
        lambda: checkpoints.e5_mistral_config(3, checkpoints.E5_MISTRAL_SMALL),
        lambda folder: checkpoints.write_e5_mistral_files(folder, checkpoints.E5_MISTRAL_SMALL),
        "last",
    ),
    "BERT-base": (
        lambda: BertConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        ),
        None,
        "mean",
    ),
}


@pytest.fixture(params=SMALL)
def pair(request, monkeypatch) -> ModelPair:
    monkeypatch.setattr(pairs, "MODELS", SMALL)
    return ModelPair(request.param, "cpu", torch.float32)


def test_forward(pair):
    lengths = [3, 70, 31]
    batch = workloads.token_ids(lengths, pair.padding, "cpu", shared=2)
    batch["input_ids"].remainder_(pair.original.config.vocab_size)
    batch["input_ids"][batch["attention_mask"] == 0] = pair.padding
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"][:, :2].unique(dim=0).shape[0] == 1
    wanted = pair.forward_of("transformers")(batch)
    torch.testing.assert_close(pair.embed(batch), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(wanted.norm(dim=1), torch.ones(3))


def test_texts_through_both_libraries(pair):
    if pair.write_files is None:
        pytest.skip("timed on token ids only")
    pytest.importorskip("sentence_transformers")
    lengths = [workloads.LONGEST, 32, 9]
    texts = workloads.texts_of(pair.tokenizer, lengths)
    assert [len(ids) for ids in pair.tokenizer(texts)["input_ids"]] == lengths
    found = pair.embedder.encode(texts).dense
    wanted = pair.sentence_transformer.encode(texts, convert_to_tensor=True)
    assert pair.embedder.model is pair.patched
    assert pair.sentence_transformer[0].auto_model is pair.original
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=2e-5)


def test_lengths_of_mixed_texts():
    lengths = workloads.MIXED.lengths()
    assert min(lengths) >= 10
    assert max(lengths) <= 500
    assert sum(lengths) / len(lengths) == pytest.approx(168, rel=0.02)
