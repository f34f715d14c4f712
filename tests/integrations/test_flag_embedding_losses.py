"""FlagEmbedding's training models and their drop-ins give the same loss and the same gradient."""

import logging

import pytest
import torch
from transformers import BertConfig, BertModel, MistralConfig, MistralModel

pytest.importorskip("FlagEmbedding")

from FlagEmbedding.finetune.embedder.decoder_only.base import modeling as decoder_only
from FlagEmbedding.finetune.embedder.encoder_only.base import modeling as encoder_only

from embedfuse.integrations.flag_embedding import losses as drop_ins

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
QUERIES = 5


def tower(decoder: bool):
    torch.manual_seed(0)
    if decoder:
        return MistralModel(MistralConfig(num_key_value_heads=1, **SIZES))
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
    return BertModel(config)


def models(decoder=False, **settings):
    """(original, drop-in) on equal weights, in training mode."""
    name = "BiDecoderOnlyEmbedderModel" if decoder else "BiEncoderOnlyEmbedderModel"
    settings = {"temperature": 0.05, "normalize_embeddings": True, **settings}
    original = getattr(decoder_only if decoder else encoder_only, name)(tower(decoder), **settings)
    return original, getattr(drop_ins, name)(tower(decoder), **settings)


def batch(group: int, teacher: bool = False) -> dict:
    generator = torch.Generator().manual_seed(group)

    def texts(rows):
        ids = torch.randint(1, 50, (rows, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 5:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    scores = torch.rand(QUERIES * group, generator=generator).tolist() if teacher else None
    return {"queries": texts(QUERIES), "passages": texts(QUERIES * group), "teacher_scores": scores}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def assert_same(original, drop_in, inputs):
    wanted, expected = loss_and_gradients(original, inputs)
    found, grads = loss_and_gradients(drop_in, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        atol = 5e-6 * max(grad.abs().max().item(), 1)
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=atol)
    return found


@pytest.fixture
def scores_forbidden(monkeypatch):
    """The drop-ins never compute the original's matrix of scores."""

    def forbidden(self, *args):
        pytest.fail("all scores were computed")

    for model in (drop_ins.BiEncoderOnlyEmbedderModel, drop_ins.BiDecoderOnlyEmbedderModel):
        monkeypatch.setattr(model, "compute_score", forbidden)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("decoder", [False, True])
def test_in_batch(decoder, group, scores_forbidden):
    pooling = "last_token" if decoder else "cls"
    pair = models(decoder, sentence_pooling_method=pooling)
    assert_same(*pair, batch(group))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "normalize_embeddings": False},
        {"temperature": 0.01, "sentence_pooling_method": "mean"},
        {"use_mrl": True, "mrl_dims": [4, 16]},
        {"sub_batch_size": 2},
    ],
)
def test_settings(settings, scores_forbidden):
    assert_same(*models(**settings), batch(3))


def test_distillation(scores_forbidden):
    pair = models()
    plain = assert_same(*pair, batch(3))
    taught = assert_same(*pair, batch(3, teacher=True))
    assert taught > plain + 0.1


def test_no_in_batch_negatives():
    """The original's code as it is: its scores are those of the groups."""
    assert_same(*models(), batch(3) | {"no_in_batch_neg_flag": True})


def test_m3_distillation_runs_the_original_and_says_so_once(caplog):
    pair = models(kd_loss_type="m3_kd_loss")
    with caplog.at_level(logging.WARNING, "embedfuse"):
        for _ in range(2):
            assert_same(*pair, batch(3, teacher=True))
    assert [record.getMessage() for record in caplog.records] == [
        "BiEncoderOnlyEmbedderModel: the original's code, which stores all scores, runs for "
        "kd_loss_type='m3_kd_loss'"
    ]


def test_a_built_model_changes_its_class(scores_forbidden):
    original, drop_in = models()
    wanted = loss_and_gradients(original, batch(2))[0]
    original.__class__ = type(drop_in)
    torch.testing.assert_close(loss_and_gradients(original, batch(2))[0], wanted)
    assert isinstance(original, encoder_only.BiEncoderOnlyEmbedderModel)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("teacher", [False, True])
def test_cross_device(rank, teacher, monkeypatch, scores_forbidden):
    """Two processes; the rows of the second are those of the first in reverse."""

    def gather(self, x):
        both = [x.detach().flip(0), x]
        return torch.cat(both if rank else both[::-1])

    pair = models()
    for model in pair:
        monkeypatch.setattr(type(model), "_dist_gather_tensor", gather)
        model.negatives_cross_device, model.process_rank = True, rank
    assert_same(*pair, batch(3, teacher))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_as_accurate_as_the_original(dtype, autocast):
    """Loss and gradients from embeddings against fp64; a gradient's error is one number, its norm."""
    pair = models(temperature=0.02)
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(64, 1, 96, generator=generator)
    q = torch.nn.functional.normalize(
        center[:, 0] + torch.randn(64, 96, generator=generator), dim=1
    )
    p = center + torch.randn(64, 3, 96, generator=generator)
    p = torch.nn.functional.normalize(p, dim=2).flatten(0, 1)
    if not autocast:
        q, p = q.to(dtype), p.to(dtype)
    targets = torch.rand(64, 3, generator=generator).softmax(1)

    def results(model, q, p, targets):
        leaves = [x.detach().requires_grad_() for x in (q, p)]
        loss = model._compute_in_batch_neg_loss(*leaves, targets)[1]
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    for teacher in (None, targets):
        pair[0].kd_loss_type = pair[1].kd_loss_type = "kl_div"
        exact = results(pair[0], q.double(), p.double(), teacher)
        with torch.autocast("cpu", dtype, enabled=autocast):
            reference, found = (results(model, q, p, teacher) for model in pair)
        for got, wanted, best in zip(found, reference, exact, strict=True):
            error, reference_error = ((x - best).norm() / best.norm() for x in (got, wanted))
            assert error <= 1.02 * reference_error + 1e-6
