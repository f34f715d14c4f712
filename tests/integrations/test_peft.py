"""LoRA on a decoder: unmerged and merged, patched from outside and from inside."""

import copy

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from tests.patching.decoders import make_model
from tests.patching.encoders import make_batch
from tests.patching.encoders import make_model as make_encoder

peft = pytest.importorskip("peft")
TIGHT = {"rtol": 0, "atol": 2e-5}


def adapted(targets, task="FEATURE_EXTRACTION"):
    config = peft.LoraConfig(r=4, target_modules=targets, task_type=task, init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(make_model("mistral"), config).eval()


def states(model, batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state[batch["attention_mask"] != 0]


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None])
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj", "o_proj"], "all-linear"], ids=str
)
def test_lora(targets, outside, task):
    model = adapted(targets, task)
    kind, batch = type(model), make_batch(model.get_base_model(), side="left")
    expected = states(model, batch)
    with model.disable_adapter():
        assert (states(model, batch) - expected).abs().max() > 0.1
    whole = model if outside else model.get_base_model()
    report = embedfuse.patch(whole)
    assert_close(states(model, batch), expected, **TIGHT)
    model.merge_adapter()
    assert_close(states(model, batch), expected, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    assert_close(states(model, batch), expected, rtol=0, atol=1e-4)
    assert not report.original_calls
    embedfuse.unpatch(whole)
    assert type(model) is kind
    assert not isinstance(model.get_base_model(), embedfuse.patching.swap.Patched)


def test_merged_and_unloaded():
    model = adapted("all-linear")
    batch = make_batch(model.get_base_model())
    expected = states(model, batch)
    plain = model.merge_and_unload()
    report = embedfuse.patch(plain)
    assert report.refused == {}
    assert_close(states(plain, batch), expected, rtol=0, atol=1e-4)


def test_gradients_of_the_adapters():
    model = adapted(["q_proj", "v_proj", "up_proj"])
    batch = make_batch(model.get_base_model(), side="left")

    def gradients():
        model.zero_grad()
        kept = model(**batch).last_hidden_state[batch["attention_mask"] != 0]
        (kept * torch.linspace(-1, 1, kept.numel()).view_as(kept)).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    report = embedfuse.patch(model)
    found = gradients()
    assert found.keys() == expected.keys()
    assert all("lora" in name for name in found)
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=1e-5 * value.abs().max().item(), msg=name)
    assert not report.original_calls


@pytest.mark.parametrize("patched", [True, False])
def test_embed(patched):
    model = adapted(["q_proj", "v_proj"])
    batch = make_batch(model.get_base_model(), (20, 3, 11), "left")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(**batch).last_hidden_state[:, -1])
        if patched:
            embedfuse.patch(model)
        assert_close(embedfuse.embed(model, **batch, pooling="last"), expected, **TIGHT)


def test_prefixes_of_an_adapter_that_is_turned_off():
    """Adapters are switched without a change of any parameter."""
    model = adapted(["q_proj", "v_proj"])
    embedfuse.patch(model, reuse_prefixes="stream")
    queries = [torch.tensor([[*range(5, 32), last]]) for last in (40, 41, 42)]
    with torch.no_grad():
        for query in queries[:2]:
            embedfuse.embed(model, query, pooling="last")
        with model.disable_adapter():
            found = embedfuse.embed(model, queries[2], pooling="last")
            embedfuse.unpatch(model)
            expected = embedfuse.embed(model, queries[2], pooling="last")
    assert_close(found, expected, **TIGHT)


def test_embed_takes_no_learned_prompts():
    """Prompt rows come before the rows of the text, which `embed` does not expect."""
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION")
    model = peft.get_peft_model(make_model("mistral"), config)
    batch = make_batch(model.get_base_model())
    with pytest.raises(TypeError, match="model: a PEFT model that learns prompts"):
        embedfuse.embed(model, **batch, pooling="last")


@pytest.mark.parametrize("first", ["patch", "adapt"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["word_embeddings"]},
        {"target_modules": ["position_embeddings", "query"]},
        {"target_modules": ["token_type_embeddings"]},
        {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [7, 8, 9]}},
        {"target_modules": ["query"], "modules_to_save": ["LayerNorm", "word_embeddings"]},
    ],
    ids=lambda config: "-".join(config["target_modules"] + list(config)[1:]),
)
def test_adapters_on_the_embeddings_of_an_encoder(family, config, first):
    original = make_encoder(family).double()
    patched = copy.deepcopy(original)
    if first == "patch":
        embedfuse.patch(patched)
    pair = []
    for model in (original, patched):
        torch.manual_seed(1)
        config_ = peft.LoraConfig(r=4, init_lora_weights=False, **config)
        pair.append(peft.get_peft_model(model, config_).eval())
    if first == "adapt":
        embedfuse.patch(patched)
    batch = make_batch(original)
    batch["input_ids"][0, 1:4] = torch.tensor([7, 8, 9])
    gradients = []
    for model in pair:
        out = model(**batch).last_hidden_state[batch["attention_mask"] != 0]
        (out * torch.linspace(-1, 1, out.numel()).double().view_as(out)).sum().backward()
        named = model.named_parameters()
        gradients.append(
            {"out": out.detach()} | {n: p.grad for n, p in named if p.grad is not None}
        )
    expected, found = gradients
    assert found.keys() == expected.keys()
    assert len(found) > 2
    for name, value in expected.items():
        assert value.abs().max() > 1e-3, name
        assert_close(found[name], value, rtol=1e-8, atol=1e-9, msg=name)
    assert not embedfuse.report(patched).original_calls
