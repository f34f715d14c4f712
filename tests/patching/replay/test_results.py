"""Small batches by graphs: the vectors of the forward that runs, whatever came before and beside."""

import copy
import threading

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from tests.patching import decoders
from tests.patching.encoders import make_batch, make_classifier, make_model
from tests.patching.replay.models import (
    SHAPES,
    TIGHT,
    captures,
    graphs,
    make,
    pair_of,
    patched,
    pooled,
    states,
)
from tests.recorded_graphs import RecordedGraphs

UNUSED = 3  # no token of make_batch
ALL = ["bert", "roberta", "xlm_roberta", *decoders.FAMILIES]


@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
@pytest.mark.parametrize("family", ALL)
def test_pooled(family, pooling):
    model, original = pair_of(family)
    for _ in range(3):
        for lengths in SHAPES:
            found, expected = (pooled(m, lengths, pooling) for m in (model, original))
            assert_close(found, expected, **TIGHT)
    buckets = {(16, 1), (16, 8), (64, 8), (16, 64), (128, 8)}
    assert captures() == len(graphs(model)) == len(buckets)
    assert embedfuse.report(model).graphs == "5 captured"
    assert "graphs   5 captured" in str(embedfuse.report(model))


def test_states(pair):
    model, original = pair
    for _ in range(2):
        for lengths in SHAPES:
            assert_close(states(model, lengths), states(original, lengths), **TIGHT)
    assert captures() == 5


@pytest.mark.parametrize("family", ALL)
def test_what_is_left_free_touches_nothing(family):
    """The free tokens are NaN from the embedding on, and the texts' own are the same to the bit."""
    model = make(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[UNUSED] = torch.nan
    patched(model)
    for pooling in ("last", "mean"):
        for _ in range(2):
            pooled(model, (9, 3), pooling)
        clean = [pooled(model, lengths, pooling) for lengths in ((9, 3), (2,) * 5, (1, 14))]
        for graph in graphs(model)._graphs.values():
            graph.buffers[1].fill_(UNUSED)
        for lengths, expected in zip(((1, 14), (2,) * 5, (9, 3)), reversed(clean), strict=True):
            for graph in graphs(model)._graphs.values():
                graph.buffers[1][sum(lengths) :] = UNUSED
            assert torch.equal(pooled(model, lengths, pooling), expected)
    assert captures() == 2


def test_left_padding(pair):
    model, original = pair
    for _ in range(3):
        found, expected = (states(m, (9, 3), "left") for m in (model, original))
        assert_close(found, expected, **TIGHT)


def test_given_positions_and_types():
    original = make_model("bert", type_vocab_size=2)
    model = patched(copy.deepcopy(original))
    for start in (0, 3, 7):
        ids = torch.arange(9)
        more = {"token_type_ids": (ids > start).long()[None], "position_ids": (ids + start)[None]}
        assert_close(states(model, (9,), **more), states(original, (9,), **more), **TIGHT)
        assert_close(states(model, (9,)), states(original, (9,)), **TIGHT)
    assert len(graphs(model)) == 2


def test_classifier():
    original = make_classifier("roberta")
    model = patched(copy.deepcopy(original))
    for lengths in ((9, 3), (4, 4), (8, 1)):
        batch = make_batch(model, lengths)
        with torch.no_grad():
            assert_close(model(**batch).logits, original(**batch).logits, **TIGHT)
    assert captures() == 1


def test_too_large(pair):
    model, original = pair
    for _ in range(2):
        assert_close(pooled(model, (60,) * 18), pooled(original, (60,) * 18), **TIGHT)
        assert_close(pooled(model, (1,) * 65), pooled(original, (1,) * 65), **TIGHT)
    assert captures() == 0


def test_more_free_tokens_than_positions():
    """385 tokens leave 127 of 512 free; the position table has 70."""
    original = make_model("bert")
    model = patched(copy.deepcopy(original))
    lengths = (60, 60, 60, 60, 60, 60, 25)
    for _ in range(3):
        assert_close(pooled(model, lengths), pooled(original, lengths), **TIGHT)
    assert captures() == 0


def test_threads(pair):
    model, original = pair
    expected = {lengths: pooled(original, lengths) for lengths in SHAPES}
    failures = []

    def work(seed):
        for i in range(2 * len(SHAPES)):
            lengths = SHAPES[(i + seed) % len(SHAPES)]
            if not torch.allclose(pooled(model, lengths), expected[lengths], rtol=0, atol=2e-5):
                failures.append(lengths)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert captures() == 5


def test_two_models():
    originals = [make_model("bert"), make("mistral"), make_model("bert", hidden_size=32)]
    models = [patched(copy.deepcopy(m)) for m in originals]
    for _ in range(3):
        for model, original in zip(models, originals, strict=True):
            assert_close(pooled(model, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    assert [g.captures for g in RecordedGraphs.made] == [1, 1, 1]


@pytest.mark.parametrize("reuse", ["off", "batch", "stream"])
def test_prefixes(reuse):
    """Up to 256 tokens, and for one text, a graph; else texts share what they begin with."""
    original = make("mistral")
    model = patched(copy.deepcopy(original), reuse_prefixes=reuse)
    small, large, alone = (20, 20, 20), (50,) * 6, (300,)
    for lengths in (small, large, alone) * 3:
        assert_close(pooled(model, lengths), pooled(original, lengths), **TIGHT)
    assert captures() == (3 if reuse == "off" else 2)
