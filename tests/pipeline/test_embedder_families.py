"""Embedder on a checkpoint of each family: the vectors of transformers with the family's prompts."""

from dataclasses import replace

import numpy as np
import pytest

import embedfuse
from embedfuse import PRESETS, Embedder, Preset
from tests.pipeline.families import (
    SIZES,
    TEXTS,
    Plain,
    make,
    write_llama_tokenizer,
    write_qwen_tokenizer,
    write_sentence_transformers,
)

SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
# Folder, architecture, pooling, id of the end token, prompts of queries, of an instruction, of documents.
ASKED = f"Instruct: {SEARCH}\nQuery:", "Instruct: Do this\nQuery:", ""
SPACED = f"{ASKED[0]} ", f"{ASKED[1]} ", ""
E5 = "query: ", None, "passage: "
FAMILIES = {
    "e5": ("e5-base-v2", "bert", "mean", None, *E5),
    "multilingual-e5": ("multilingual-e5-base", "xlm-roberta", "mean", None, *E5),
    "multilingual-e5-instruct": (
        *("multilingual-e5-large-instruct", "xlm-roberta", "mean", None),
        *SPACED,
    ),
    "e5-mistral": ("e5-mistral-7b-instruct", "mistral", "last", 2, *SPACED),
    "gte": ("gte-base", "bert", "mean", None, "", None, ""),
    "gte-qwen2": ("gte-Qwen2-1.5B-instruct", "qwen2", "last", 0, *SPACED),
    "qwen3-embedding": ("Qwen3-Embedding-4B", "qwen3", "last", 0, *ASKED),
}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    name, kind, *rest = FAMILIES[request.param]
    folder = make(tmp_path_factory.mktemp(kind) / name, kind)
    if kind == "mistral":
        write_llama_tokenizer(folder, add_bos_token=True, add_eos_token=True)
    return folder, Embedder(str(folder), device="cpu"), *rest


def assert_vectors(found, folder, texts, pooling, end, max_length=512):
    both_ways = folder.name.startswith(("gte-Qwen2", "LLM2Vec"))
    plain = Plain(folder, end, both_ways)
    expected = plain(texts, pooling, max_length).float().numpy()
    np.testing.assert_allclose(found.dense, expected, rtol=0, atol=5e-6)


def test_queries_documents_and_texts(case):
    folder, embedder, pooling, end, query, asked, document = case
    for found, prompt in (
        (embedder.encode_queries(TEXTS), query),
        (embedder.encode_documents(TEXTS), document),
        (embedder.encode(TEXTS), ""),
        (embedder.encode(TEXTS, prompt="My own: "), "My own: "),
    ):
        assert_vectors(found, folder, [prompt + text for text in TEXTS], pooling, end)
    if asked is None:
        with pytest.raises(ValueError, match="instruction='Do this': this checkpoint takes none"):
            embedder.encode_queries(TEXTS, "Do this")
    else:
        found = embedder.encode_queries(TEXTS, "Do this")
        assert_vectors(found, folder, [asked + text for text in TEXTS], pooling, end)
    assert not embedder.report.original_calls


def test_texts_that_are_cut(case):
    folder, _, pooling, end, query, *_ = case
    embedder = Embedder(str(folder), device="cpu", max_length=24)
    long = [text * 5 for text in TEXTS]
    texts = [query + text for text in long]
    assert_vectors(embedder.encode_queries(long), folder, texts, pooling, end, 24)


def test_a_stream_with_a_prompt(case):
    embedder = case[1]
    parts = list(embedder.iter_encode(iter(TEXTS), prompt=embedder.preset.prompt_of_document()))
    dense = np.concatenate([part.dense for part in parts])
    assert np.array_equal(dense, embedder.encode_documents(TEXTS).dense)


def test_array_dtype_and_no_texts(case):
    embedder = case[1]
    half = embedder.encode_queries(TEXTS, array_dtype="float16").dense
    assert half.dtype == np.float16
    assert embedder.encode_documents([]).dense.shape == (0, SIZES["hidden_size"])


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_sentence_transformers_files_win(tmp_path, kind):
    st = pytest.importorskip("sentence_transformers")
    folder = make(tmp_path / {"bert": "e5-base-v2", "qwen3": "Qwen3-Embedding-4B"}[kind], kind)
    if kind == "qwen3":
        write_qwen_tokenizer(folder, "<|endoftext|>")
    prompts = {"query": "search: ", "document": "found: "}
    write_sentence_transformers(folder, "weightedmean", prompts, max_seq_length=60)
    embedder = Embedder(str(folder), device="cpu")
    model = st.SentenceTransformer(str(folder), device="cpu")
    for found, expected in (
        (embedder.encode_queries(TEXTS), model.encode_query(TEXTS)),
        (embedder.encode_documents(TEXTS), model.encode_document(TEXTS)),
        (embedder.encode(TEXTS), model.encode(TEXTS)),
    ):
        np.testing.assert_allclose(found.dense, expected, rtol=0, atol=2e-5)
    assert embedder.max_length == 60


def test_a_preset_wins_over_the_files(tmp_path):
    folder = make(tmp_path / "e5-base-v2", "bert")
    write_sentence_transformers(folder, "cls", {"query": "search: "}, max_seq_length=60)
    embedder = Embedder(str(folder), device="cpu", preset=PRESETS["e5"])
    assert_vectors(
        embedder.encode_queries(TEXTS), folder, [f"query: {t}" for t in TEXTS], "mean", None
    )
    embedder = Embedder(str(folder), device="cpu", preset=Preset(pooling="mean", normalize=False))
    plain = Plain(folder)
    expected = np.stack([plain.states(f"search: {t}", 60).mean(0).numpy() for t in TEXTS])
    np.testing.assert_allclose(embedder.encode_queries(TEXTS).dense, expected, rtol=0, atol=2e-5)


def test_a_preset_for_an_unknown_decoder(tmp_path):
    folder = make(tmp_path / "mine", "mistral")
    with pytest.raises(ValueError, match=r"nothing says how .*accepted as preset are e5, "):
        Embedder(str(folder), device="cpu")
    embedder = Embedder(str(folder), device="cpu", preset="e5-mistral")
    texts = [f"Instruct: Do this\nQuery: {text}" for text in TEXTS]
    assert_vectors(embedder.encode_queries(TEXTS, "Do this"), folder, texts, "last", 2)
    embedder = Embedder(str(folder), device="cpu", preset=Preset(pooling="mean"))
    assert_vectors(embedder.encode(TEXTS), folder, TEXTS, "mean", None)
    with pytest.raises(ValueError, match="takes none"):
        embedder.encode_queries(TEXTS, "Do this")


def test_unsafe_dtypes(tmp_path):
    folder = make(tmp_path / "Qwen3-Embedding-4B", "qwen3")
    with pytest.raises(ValueError, match=r"dtype='float16': .*NaN.* accepted are float32 and bfl"):
        Embedder(str(folder), device="cpu", dtype="float16")
    preset = replace(PRESETS["qwen3-embedding"], unsafe_dtypes={})
    embedder = Embedder(str(folder), device="cpu", dtype="float16", preset=preset)
    assert np.isfinite(embedder.encode(TEXTS).dense).all()


def test_max_length(tmp_path):
    folder = make(tmp_path / "e5-base-v2", "bert", max_position_embeddings=580)
    assert Embedder(str(folder), device="cpu").max_length == 512  # the preset's
    assert Embedder(str(folder), device="cpu", max_length=580).max_length == 580  # the model's
    with pytest.raises(ValueError, match="max_length=581: accepted is 3 to 580"):
        Embedder(str(folder), device="cpu", max_length=581)


def test_what_needs_remote_code_raises(tmp_path):
    folder = make(tmp_path / "gte-base", "bert")
    config = (folder / "config.json").read_text().replace('"bert"', '"new"')
    remote = '"auto_map": {"AutoModel": "modeling.NewModel", "AutoConfig": "modeling.NewConfig"},'
    (folder / "config.json").write_text(config.replace("{", "{" + remote, 1))
    preset = Preset(pooling="cls")
    with pytest.raises(ValueError, match="trust_remote_code"):
        Embedder(str(folder), device="cpu", preset=preset)


def test_unpatched_by_somebody(tmp_path):
    folder = make(tmp_path / "e5-base-v2", "bert")
    embedder = Embedder(str(folder), device="cpu")
    expected = embedder.encode(TEXTS).dense
    embedfuse.unpatch(embedder.model)
    with pytest.raises(RuntimeError, match=r"BertModel was unpatched; embedfuse.patch it again"):
        embedder.encode(TEXTS)
    embedfuse.patch(embedder.model)
    assert np.array_equal(embedder.encode(TEXTS).dense, expected)


def test_lexical_matching_score_of_dicts(embedder):
    sparse = embedder.encode(["a"], ("sparse",)).sparse
    with pytest.raises(TypeError, match="queries: list; accepted is Csr, what encode gives"):
        embedder.lexical_matching_score(sparse.dicts(), sparse)
    with pytest.raises(TypeError, match="passages: dict; accepted is Csr"):
        embedder.lexical_matching_score(sparse, sparse.dicts()[0])


def test_an_instruction_runs_once_for_all_queries(tmp_path, computed):
    folder = make(tmp_path / "Qwen3-Embedding-4B", "qwen3")
    found = {}
    for reuse in ("off", "stream"):
        embedder = Embedder(str(folder), device="cpu", reuse_prefixes=reuse)
        computed.clear()
        found[reuse] = [embedder.encode_queries([text]).dense for text in TEXTS[1:6]]
        found[reuse].append(embedder.encode_queries(TEXTS).dense)
        found[f"{reuse} tokens"] = list(computed)
    for one, other in zip(found["off"], found["stream"], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-6)
    off, stream = found["off tokens"], found["stream tokens"]
    assert stream[:2] == off[:2]
    instruction = len(embedder.tokenizer(ASKED[0])["input_ids"])
    assert all(n <= m - instruction + 3 for n, m in zip(stream[2:5], off[2:5], strict=True))
