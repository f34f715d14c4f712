"""What a program cannot hold or run, and that the report says why; where the weights that it reads are."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import embedfuse
from embedfuse import native
from tests.patching import decoders, encoders

pytestmark = pytest.mark.usefixtures("cpp")


@torch.inference_mode()
def states(model, batch):
    return model.packed_states(batch).states.clone()


@pytest.mark.parametrize("layouts", [native.layouts(), native._layouts])
def test_layouts_tell_where_tensors_are_and_what_they_hold(layouts):
    x = torch.arange(64.0).view(8, 8)
    same, others = (
        x.detach(),
        {
            "address": x.clone(),
            "offset": torch.arange(65.0)[1:].view(8, 8),
            "strides": x.t(),
            "shape": x.view(4, 16),
            "dimensions": x.view(64),
            "dtype": x.view(torch.int32),
        },
    )
    assert layouts([x]) == layouts([same])
    assert layouts([x, same]) != layouts([x])
    for what, other in others.items():
        assert layouts([other]) != layouts([x]), what


def test_layouts_of_what_has_no_address():
    meta, sparse = torch.ones(3, device="meta"), torch.ones(3).to_sparse()
    for x in (meta, sparse):
        for layouts in (native.layouts(), native._layouts):
            assert layouts([x]) == layouts([x]) != layouts([x.clone()])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: None, None),
        (lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", nn.ReLU()),
         "the activation is a ReLU, not exact GELU"),
        (lambda m: m.encoder.layer[0].output.LayerNorm.register_parameter("weight", None),
         "a norm is a LayerNorm, or has no weight"),
        (lambda m: m.encoder.layer[0].output.LayerNorm.double(),
         "LayerNorm.weight is torch.float64 on cpu; others are torch.float32 on cpu"),
        (lambda m: m.encoder.layer[1].train(), "BertLayer.training is True"),
        (lambda m: setattr(m.embeddings.word_embeddings, "max_norm", 1.0),
         "word_embeddings is a Embedding, or has a max_norm"),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_the_report_says_why_layers_run_op_by_op(edit, reason):
    model = encoders.make_model("bert")
    report = embedfuse.patch(model)
    assert report.layers == "one call"
    edit(model)
    with contextlib.suppress(RuntimeError):  # of torch, where dtypes differ
        states(model, encoders.make_batch(model))
    assert report.layers == ("one call" if reason is None else f"op by op: {reason}")
    assert f"layers        {report.layers}" in str(report)
    assert copy.deepcopy(model)._embedfuse.report.layers == "no inference has come"


@torch.inference_mode()
def test_the_report_says_what_keeps_kernels_from_running():
    model = encoders.make_model("bert")
    batch, report = encoders.make_batch(model), embedfuse.patch(model)
    with embedfuse.use_backend("reference"):
        states(model, batch)
    assert report.layers == "op by op: backend 'reference' was asked for"
    states(model, batch)
    assert report.layers == "one call"
    with torch.autocast("cpu", torch.bfloat16):
        states(model, batch)
    assert report.layers == "op by op: autocast is on for cpu"
    states(model.double(), batch)
    assert "no kernel for torch.float64 on cpu" in report.layers


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [torch.Tensor.to_sparse, lambda w: torch._efficientzerotensor(w.shape)]
)
def test_weights_without_memory_of_their_own_run_in_torch(make):
    model = encoders.make_model("bert")
    query = model.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(make(query.weight.detach()), requires_grad=False)
    batch = encoders.make_batch(model)
    expected = encoders.states(model, batch)
    embedfuse.patch(model)
    torch.testing.assert_close(encoders.states(model, batch), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_a_model_on_the_meta_device_answers(family):
    model = {"bert": encoders, "mistral": decoders}[family].make_model(family)
    embedfuse.patch(model)
    ids = torch.ones(1, 5, dtype=torch.int64, device="meta")
    assert model.to("meta")(input_ids=ids).last_hidden_state.shape[:2] == (1, 5)


def test_a_profiler_sees_the_layers():
    model = encoders.make_model("bert")
    embedfuse.patch(model)
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(**encoders.make_batch(model))
    assert "embedfuse::linear" in {event.key for event in profile.key_averages()}
