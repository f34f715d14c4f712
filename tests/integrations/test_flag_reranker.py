"""A patched FlagReranker gives the scores of FlagEmbedding."""

import copy
import gc
import pickle

import pytest
import torch

import embedfuse
from tests.integrations.flag import DOCSTRINGS, TEXTS, counted, original_forbidden

fe = pytest.importorskip("FlagEmbedding")

PAIRS = [(DOCSTRINGS[i % 4], text) for i, text in enumerate(TEXTS)] + [("", ""), ("", "a text")]
LONG = " ".join(DOCSTRINGS)


def load(folder: str, **kwargs):
    return fe.FlagReranker(folder, use_fp16=False, devices="cpu", **kwargs)


@pytest.fixture(scope="module")
def original(reranker_folder):
    return load(reranker_folder)


@pytest.fixture(scope="module")
def model(reranker_folder):
    model = load(reranker_folder)
    embedfuse.patch(model)
    return model


@pytest.fixture
def fresh(reranker_folder):
    return load(reranker_folder)


def assert_same(found, expected):
    assert type(found) is type(expected) is list
    assert {type(score) for score in found} == {float}
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("normalize", [False, True, None])
def test_scores(original, model, normalize):
    expected = original.compute_score(PAIRS, normalize=normalize)
    assert_same(model.compute_score(PAIRS, normalize=normalize), expected)
    assert max(expected) - min(expected) > 0.01


def test_normalize_is_a_sigmoid(model):
    plain, squashed = (model.compute_score(PAIRS[:5], normalize=on) for on in (False, True))
    assert squashed == pytest.approx(torch.tensor(plain).sigmoid().tolist(), abs=1e-6)


@pytest.mark.parametrize("as_type", [tuple, list])
def test_one_pair(original, model, as_type):
    pair = as_type(PAIRS[1])
    assert_same(model.compute_score(pair), original.compute_score(pair))


@pytest.mark.parametrize(
    "pairs",
    [
        [("a query", "")],
        [("a query", ""), ("a query", "a passage")],
        [("", "")],
        [("<s>", "</s> <pad>"), ("日本語", "🎉")],
        [(PAIRS[0])] * 5,
        [(*PAIRS[0], "label")],
    ],
)
def test_odd_pairs(original, model, pairs):
    assert_same(model.compute_score(pairs), original.compute_score(pairs))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_length": 40},
        {"max_length": 64, "query_max_length": 9},
        {"max_length": 30, "query_max_length": 25},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_truncation(original, model, arguments):
    pairs = [(LONG, "short"), ("short", LONG), (LONG, LONG), (LONG[100:], TEXTS[0])]
    found = model.compute_score(pairs, **arguments)
    assert_same(found, original.compute_score(pairs, **arguments))
    assert len(set(found)) == 4


def test_a_query_that_leaves_no_room_raises_as_before(original, model):
    for m in (original, model):
        with pytest.raises(Exception, match="Truncation error"):
            m.compute_score([("short", LONG), (LONG, LONG)], max_length=20, query_max_length=40)


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": True},
        {"max_length": 50, "query_max_length": 20, "batch_size": 3},
        {"query_instruction_for_rerank": "Which answers ", "query_instruction_format": "{}{}?"},
        {
            "query_instruction_for_rerank": "Q",
            "passage_instruction_for_rerank": "P",
            "passage_instruction_format": "{}: {}",
        },
    ],
    ids=lambda settings: "+".join(settings)[:40],
)
def test_settings(reranker_folder, settings):
    model = load(reranker_folder, **settings)
    expected = model.compute_score(PAIRS[:20])
    embedfuse.patch(model)
    assert_same(model.compute_score(PAIRS[:20]), expected)


def test_tokenizer_arguments_go_to_the_original(original, model):
    report = embedfuse.report(model)
    found = model.compute_score(PAIRS[:9], verbose=False)
    assert_same(found, original.compute_score(PAIRS[:9], verbose=False))
    assert report.original_calls == {"called with verbose": 1}


def test_one_packed_forward_and_no_padded_one(model):
    with original_forbidden(), counted(model.model) as tokens:
        model.compute_score(PAIRS[:20])
        assert len(tokens) == 1
        model.compute_score(PAIRS[:20], batch_size=1, max_length=32)
        assert max(tokens[1:]) <= 32
        tokens.clear()
        model.compute_score(PAIRS[:20])  # a small batch size holds for its call alone
        assert len(tokens) == 1
    assert embedfuse.report(model).fused[-1] == "packed query-passage pairs, batched by tokens"


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        (("a", None), TypeError, r"passages\[1\]: NoneType; accepted is str"),
        (("a\ud800", "b"), ValueError, r"queries\[1\]: lone surrogate"),
    ],
)
def test_bad_texts(model, pair, error, message):
    with pytest.raises(error, match=message):
        model.compute_score([("a", "b"), pair])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_bad_batch_size(model, batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}: accepted is 1 or more"):
        model.compute_score(PAIRS[:2], batch_size=batch_size)


def test_a_hook_on_the_model_runs(fresh):
    expected = fresh.compute_score(PAIRS[:20])
    report = embedfuse.patch(fresh)
    calls = []
    hook = fresh.model.register_forward_hook(lambda *_: calls.append(1))
    assert_same(fresh.compute_score(PAIRS[:20]), expected)
    hook.remove()
    assert len(calls) == 2  # FlagEmbedding runs its first batch twice
    assert report.original_calls == {"the model has a hook": 1}
    embedfuse.unpatch(fresh.model)
    assert fresh.compute_score(PAIRS[:20]) == expected
    assert report.original_calls["the model inside is not patched"] == 1


def test_unpatch_is_exact(fresh):
    expected = fresh.compute_score(PAIRS[:20])
    embedfuse.patch(fresh)
    assert embedfuse.patch(fresh) is embedfuse.report(fresh)
    embedfuse.unpatch(fresh)
    assert type(fresh) is fe.FlagReranker
    assert fresh.compute_score(PAIRS[:20]) == expected
    with embedfuse.patched(fresh):
        assert_same(fresh.compute_score(PAIRS[:20]), expected)
    assert fresh.compute_score(PAIRS[:20]) == expected


@pytest.mark.parametrize("wrong", ["sequence_logits", "_pair_ids"])
def test_a_wrong_forward_is_found_and_undone(fresh, model, monkeypatch, wrong):
    expected = fresh.compute_score(PAIRS[:20])
    owner = type(model) if wrong == "_pair_ids" else type(model.model)
    right = getattr(owner, wrong)

    def broken(*args):
        found = right(*args)
        return [ids[:-2] for ids in found] if wrong == "_pair_ids" else found + 0.1

    with monkeypatch.context() as patch:
        patch.setattr(owner, wrong, broken)
        with pytest.raises(embedfuse.PatchError, match="scores: the patched forward deviates"):
            embedfuse.patch(fresh)
    assert type(fresh) is fe.FlagReranker
    assert "_embedfuse" not in vars(fresh) | vars(fresh.model)
    assert fresh.compute_score(PAIRS[:20]) == expected


def test_several_labels_are_refused(fresh):
    fresh.model.config.num_labels = 3
    with pytest.raises(TypeError, match="model: 3 labels; accepted is 1"):
        embedfuse.patch(fresh)
    assert type(fresh) is fe.FlagReranker


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(model, copied):
    other = copied(model)
    assert_same(other.compute_score(PAIRS[:9]), model.compute_score(PAIRS[:9]))
    embedfuse.unpatch(other)
    assert type(other) is fe.FlagReranker


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_dropping_it_raises_nothing(reranker_folder):
    model = load(reranker_folder)
    embedfuse.patch(model)
    del model
    gc.collect()
