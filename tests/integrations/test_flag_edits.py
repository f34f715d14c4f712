"""An edit of a patched object of FlagEmbedding has the effect that it has on an unpatched one."""

import numpy as np
import pytest
import torch
from tokenizers import processors

import embedfuse
from tests.integrations import flag_llm, flag_m3
from tests.integrations.flag import DOCSTRINGS

fe = pytest.importorskip("FlagEmbedding")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [*DOCSTRINGS[:4], "", "word " * 30]
PAIRS = [(DOCSTRINGS[5], text) for text in TEXTS]
FUSED = None  # where the pipeline runs the edited object


def put(path: str, value):
    *parents, name = path.split(".")

    def edit(model):
        for part in parents:
            model = getattr(model, part)
        setattr(model, name, value() if callable(value) else value)

    return edit


def linear(columns: int):
    def made():
        torch.manual_seed(1)
        return torch.nn.Linear(64, columns)

    return made


def double(path: str):
    """Makes a method of the model inside return twice its value."""

    def edit(model):
        method = getattr(model.model, path)
        setattr(model.model, path, lambda *args, **kwargs: 2 * method(*args, **kwargs))

    return edit


def another_encoder(model):
    encoder = flag_m3.load(model.model_name_or_path).model.model
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight.mul_(-1)
    model.model.model = encoder


M3_EDITS = {
    "normalize": (put("model.normalize_embeddings", False), FUSED),
    "mean": (put("model.sentence_pooling_method", "mean"), FUSED),
    "unknown pooling": (
        put("model.sentence_pooling_method", "max"),
        "sentence_pooling_method='max'",
    ),
    "truncated": (put("truncate_dim", 16), FUSED),
    "sparse head": (put("model.sparse_linear", linear(1)), FUSED),
    "half a head": (lambda m: m.model.colbert_linear.half(), FUSED),
    "half": (lambda m: m.model.half(), FUSED),
    "lengths": (put("passage_max_length", 7), FUSED),
    "instruction": (put("query_instruction_for_retrieval", "for: "), FUSED),
    "dense": (double("_dense_embedding"), "_dense_embedding was replaced"),
    "colbert": (double("_colbert_embedding"), "_colbert_embedding was replaced"),
    "left": (put("tokenizer.padding_side", "left"), "the tokenizer pads on the left"),
    "temperature": (put("model.temperature", 0.5), "temperature=0.5"),
    "similarity": (double("_compute_similarity"), "_compute_similarity was replaced"),
    "hook": (
        lambda m: m.model.sparse_linear.register_forward_hook(lambda a, b, x: -x) and None,
        FUSED,
    ),
    "another encoder": (another_encoder, "the model inside is not patched"),
}


def outcome(model, calls) -> list:
    """What the calls return, or the class of the error that they raise."""
    results = []
    for call in calls:
        try:
            results.append(call(model))
        except Exception as error:
            results.append(type(error))
    return results


def check(load, edit, reason, calls, assert_same) -> None:
    patched, twin = load(), load()
    report = embedfuse.patch(patched)
    for model in (patched, twin):
        edit(model)
    for found, expected in zip(outcome(patched, calls), outcome(twin, calls), strict=True):
        if isinstance(expected, type):
            assert found is expected
        else:
            assert_same(found, expected)
    # The model inside may add a second reason.
    assert list(report.original_calls)[:1] == ([] if reason is FUSED else [reason])
    embedfuse.unpatch(patched)


def assert_same_m3(found, expected) -> None:
    if "dense_vecs" in expected:
        flag_m3.assert_same(found, expected)
        return
    assert found.keys() == expected.keys()
    for key, scores in expected.items():
        np.testing.assert_allclose(found[key], scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", M3_EDITS)
def test_m3(m3_folder, name):
    calls = (
        lambda m: m.encode_queries(TEXTS, **flag_m3.ALL),
        lambda m: m.encode(TEXTS, **flag_m3.ALL),
        lambda m: m.compute_score(PAIRS),
    )
    check(lambda: flag_m3.load(m3_folder), *M3_EDITS[name], calls, assert_same_m3)


@pytest.fixture(scope="module")
def qwen2_folder(tmp_path_factory) -> str:
    return flag_llm.make_qwen2(tmp_path_factory.mktemp("qwen2"))


def no_end(model):
    """Make the tokenizer add no token, so that an empty text has none."""
    model.tokenizer.backend_tokenizer.post_processor = processors.Sequence([])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (put("normalize_embeddings", False), FUSED),
        (put("truncate_dim", 16), FUSED),
        (put("tokenizer.padding_side", "right"), FUSED),
        (lambda m: m.model.half(), FUSED),
        (no_end, "a text without tokens"),
    ],
    ids=["normalize", "truncated", "right", "half", "no token"],
)
def test_llm(qwen2_folder, edit, reason):
    calls = [lambda m: m.encode(TEXTS)]
    check(lambda: flag_llm.load(qwen2_folder), edit, reason, calls, flag_llm.assert_same)


def test_reranker_that_pads_on_the_left(reranker_folder):
    def load():
        return fe.FlagReranker(reranker_folder, use_fp16=False, devices="cpu")

    def assert_same(found, expected):
        assert found == pytest.approx(expected, abs=1e-4)

    edit, calls = put("tokenizer.padding_side", "left"), [lambda m: m.compute_score(PAIRS)]
    check(load, edit, "the tokenizer pads on the left", calls, assert_same)
