"""Graphs and the model's life: weights that change or move, copies, `patch`, `unpatch`."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import embedfuse
from embedfuse.nn.graphs import GraphCache
from tests.patching.encoders import make_model
from tests.patching.replay.models import (
    TIGHT,
    block_of,
    captures,
    graphs,
    linear_of,
    pair_of,
    pooled,
    with_graphs,
)
from tests.recorded_graphs import RecordedGraphs


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


def _assigned(model):
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _moved_inside(model):
    block_of(model).double().float()
    with torch.no_grad():
        linear_of(model).weight.mul_(1.3)


def _moved(model):
    model.double().float()
    with torch.no_grad():
        linear_of(model).weight.mul_(1.3)


def _other_data(model):
    linear = linear_of(model)
    linear.weight.data = linear.weight.data * 1.3


def _other_bias(model):
    linear = linear_of(model)
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
            linear_of(m).weight.mul_(1.3)
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
            linear_of(m).weight.mul_(1.3)
    for _ in range(2):
        assert_close(pooled(twin, (9, 3)), pooled(original, (9, 3)), **TIGHT)
    assert torch.equal(pooled(model, (9, 3)), expected)
    assert captures() == 1
    assert RecordedGraphs.made[0].replays == 2  # the twin's calls emptied nothing


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


def test_moving_frees_as_it_goes():
    """A graph that kept the old weights alive meanwhile would need memory for all of them twice."""
    model, _ = pair_of("bert")
    for _ in range(2):
        pooled(model, (9, 3))
    alive = []
    model._apply(lambda t: (alive.append(graphs(model)._snapshot is not None), t.clone())[1])
    assert alive.index(False) == 1
    assert not any(alive[1:])


def test_precision_of_fp32_is_seen():
    model, _ = pair_of("bert")
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for _ in range(2):
                pooled(model, (9, 3))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert captures() == 2


def double(tensor):
    return tensor.mul_(2)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda model: model.to("cpu"), True),
        (lambda model: model.float(), True),
        (lambda model: nn.Sequential(model).to(torch.device("cpu"), torch.float32), True),
        (lambda model: model._apply(torch.clone), False),
        (lambda model: model._apply(double), False),
        (lambda model: model.share_memory(), False),
        (lambda model: model.embeddings.word_embeddings.double(), True),  # seen when it is run
    ],
    ids=["to", "float", "from outside", "clone", "in place", "shared", "a module"],
)
@torch.no_grad()
def test_what_moves_nothing_keeps_graphs(change, kept):
    """Libraries call to(device) before every batch."""
    model, _ = pair_of("bert")
    for _ in range(2):
        pooled(model, (9, 3))
    layout = model._embedfuse.layout
    change(model)
    assert (model._embedfuse.layout is layout) == kept
    assert (len(graphs(model)) > 0) == kept
