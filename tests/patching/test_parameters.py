"""Parameters never move: patch leaves every pointer, storage and stride as other tools know them."""

import copy

import pytest
import torch

import embedfuse
from tests.patching import decoders
from tests.patching.encoders import CLASSIFIERS, FAMILIES, make_batch, make_classifier, make_model

MODELS = {
    **{name: lambda name=name: make_model(name) for name in FAMILIES},
    **{f"{name} classifier": lambda name=name: make_classifier(name) for name in CLASSIFIERS},
    **{name: lambda name=name: decoders.make_model(name) for name in decoders.FAMILIES},
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def places(model) -> dict:
    return {
        name: (id(t), t.data_ptr(), t.stride(), t.untyped_storage().data_ptr(), t._version)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }


def test_patch_and_forward_move_nothing(model):
    before = places(model)
    embedfuse.patch(model)
    assert places(model) == before
    with torch.no_grad():
        model(**make_batch(model))
    model(**make_batch(model))
    assert places(model) == before
    embedfuse.unpatch(model)
    assert places(model) == before


def test_every_weight_has_a_storage_of_its_own(model):
    embedfuse.patch(model)
    for twin in (model, copy.deepcopy(model), model.double()):
        for name, p in twin.named_parameters():
            assert p.untyped_storage().nbytes() == p.nbytes, name
