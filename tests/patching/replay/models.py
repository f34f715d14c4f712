"""Models whose CUDA graphs are recorded on the CPU."""

import copy

import torch
from torch import nn

import embedfuse
from embedfuse.nn.graphs import GraphCache
from tests.patching import decoders
from tests.patching.encoders import make_batch, make_model
from tests.recorded_graphs import RecordedGraphs

# Another number of rows is another GEMM: rounding differs in the last bits.
TIGHT = {"rtol": 0, "atol": 2e-5}
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


def pair_of(family):
    original = make(family)
    return patched(copy.deepcopy(original)), original


def block_of(model):
    return model.layers[1].mlp if hasattr(model, "layers") else model.encoder.layer[1]


def linear_of(model) -> nn.Linear:
    return next(m for m in block_of(model).modules() if type(m) is nn.Linear)
