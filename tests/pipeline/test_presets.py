"""Which preset a checkpoint gets, and which source takes precedence."""

import json
from dataclasses import fields, replace

import pytest

from embedfuse import PRESETS, Preset
from embedfuse.pipeline.checkpoint import adapter_base, read_preset
from embedfuse.pipeline.presets import find_preset, repository_name
from tests.pipeline.families import write_sentence_transformers

SEARCH = "Given a web search query, retrieve relevant passages that answer the query"


@pytest.fixture
def folder(tmp_path):
    def make(name: str, **config):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.mark.parametrize(
    ("name", "model_type", "preset"),
    [
        ("intfloat/e5-base-v2", "bert", "e5"),
        ("intfloat/e5-small", "bert", "e5"),
        ("intfloat/e5-large-unsupervised", "bert", "e5"),
        ("intfloat/multilingual-e5-large", "xlm-roberta", "e5"),
        ("intfloat/multilingual-e5-small", "bert", "e5"),
        ("intfloat/multilingual-e5-large-instruct", "xlm-roberta", "multilingual-e5-instruct"),
        ("intfloat/e5-mistral-7b-instruct", "mistral", "e5-mistral"),
        ("thenlper/gte-base", "bert", "gte"),
        ("Alibaba-NLP/gte-Qwen2-1.5B-instruct", "qwen2", "gte-qwen2"),
        ("Alibaba-NLP/gte-Qwen2-7B-instruct", "qwen2", "gte-qwen2"),
        ("Qwen/Qwen3-Embedding-0.6B", "qwen3", "qwen3-embedding"),
        ("/models/qwen3-embedding-8b/", "qwen3", "qwen3-embedding"),
        ("McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp", "llama", "llm2vec"),
        ("McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp", "mistral", "llm2vec-inst"),
        ("McGill-NLP/LLM2Vec-Llama-2-7b-chat-hf-mntp", "llama", "llm2vec-inst"),
        (
            "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp",
            "llama",
            "llm2vec-llama-3-instruct",
        ),
        ("hub/models--intfloat--e5-base-v2/snapshots/1c644c92ad3b", "bert", "e5"),
        ("intfloat/e5-base-v2", None, "e5"),
        ("intfloat/e5-base-v2", "mistral", None),
        ("my/e5-base-v2-of-mine", "bert", None),
        ("e5-base-v2/checkpoint-100", "bert", None),
        ("Alibaba-NLP/gte-base-en-v1.5", "new", None),
        ("BAAI/bge-m3", "xlm-roberta", None),
        ("Qwen/Qwen3-Embedding-0.6B-GGUF", "qwen3", None),
        ("mistralai/Mistral-7B-v0.1", "mistral", None),
    ],
)
def test_found_by_name_and_model_type(name, model_type, preset):
    found = find_preset([name], model_type)
    assert found == (Preset() if preset is None else PRESETS[preset])


def test_a_name_on_windows():
    assert repository_name(r"C:\models\e5-base-v2") == "e5-base-v2"
    assert repository_name("") == ""


@pytest.mark.parametrize(
    ("name", "query", "document", "asked"),
    [
        ("e5", "query: ", "passage: ", None),
        (
            "multilingual-e5-instruct",
            f"Instruct: {SEARCH}\nQuery: ",
            "",
            "Instruct: Do {x}\nQuery: ",
        ),
        ("e5-mistral", f"Instruct: {SEARCH}\nQuery: ", "", "Instruct: Do {x}\nQuery: "),
        ("gte", "", "", None),
        ("gte-qwen2", f"Instruct: {SEARCH}\nQuery: ", "", "Instruct: Do {x}\nQuery: "),
        ("qwen3-embedding", f"Instruct: {SEARCH}\nQuery:", "", "Instruct: Do {x}\nQuery:"),
        ("llm2vec", f"{SEARCH}: ", "", "Do {x} "),
        ("llm2vec-inst", f"{SEARCH}: ", "", "Do {x} "),
        ("llm2vec-llama-3-instruct", f"{SEARCH}: ", "", "Do {x} "),
    ],
)
def test_prompts_are_those_of_the_model_cards(name, query, document, asked):
    preset = PRESETS[name]
    assert preset.prompt_of_query(None) == query
    assert preset.prompt_of_document() == document
    if asked is not None:
        assert preset.prompt_of_query("Do {x}") == asked
        with pytest.raises(ValueError, match="instruction=' ': accepted is a sentence"):
            preset.prompt_of_query(" ")
    else:
        with pytest.raises(ValueError, match=r"instruction='Do \{x\}': this checkpoint takes none"):
            preset.prompt_of_query("Do {x}")


def test_every_entry_says_what_goes_for_a_family():
    for name, preset in PRESETS.items():
        said = {"pooling", "normalize", "max_length", "query_prompt", "document_prompt"}
        assert not [f for f in said if getattr(preset, f) is None], name
        assert (preset.pooling == "last") == bool(preset.end_token), name
        assert set(preset.unsafe_dtypes or {}) <= {"float16", "bfloat16"}, (
            name
        )  # fp32 is the default
    assert {n for n, p in PRESETS.items() if p.attention == "bidirectional"} == {
        *("gte-qwen2", "llm2vec", "llm2vec-inst", "llm2vec-llama-3-instruct")
    }


def test_filled():
    mine = Preset(pooling="last", query_prompt="")
    full = mine.filled(PRESETS["e5"])
    assert (full.pooling, full.query_prompt) == ("last", "")
    assert full == replace(PRESETS["e5"], pooling="last", query_prompt="")
    assert {f.name for f in fields(Preset) if getattr(Preset(), f.name) is not None} == set()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pooling", "max", "pooling='max': accepted are cls, last, mean, weighted_mean"),
        ("attention", "none", "attention='none': accepted are own, bidirectional"),
        ("instruction_prompt", "Task: ", r"accepted is text with \{instruction\}"),
    ],
)
def test_wrong_fields(field, value, message):
    with pytest.raises(ValueError, match=message):
        Preset(**{field: value})


def test_dtypes():
    for name in ("multilingual-e5-instruct", "qwen3-embedding"):
        preset = PRESETS[name]
        preset.check_dtype("float32")
        preset.check_dtype("bfloat16")
        with pytest.raises(ValueError, match=r"float16.*issue.*accepted are float32 and bfloat16"):
            preset.check_dtype("float16")
        replace(preset, unsafe_dtypes={}).check_dtype("float16")


def test_files_win_over_the_table(folder):
    path = folder("e5-base-v2", model_type="bert")
    prompts = {"query": "q> ", "passage": "p> ", "other": "o> "}
    write_sentence_transformers(path, "cls", prompts, max_seq_length=128)
    found = read_preset(str(path), {})
    assert (found.pooling, found.max_length) == ("cls", 128)
    assert (found.query_prompt, found.document_prompt, found.prompt) == ("q> ", "p> ", "")


def test_an_empty_prompt_in_the_files_says_nothing(folder):
    path = folder("e5-base-v2", model_type="bert")
    write_sentence_transformers(path, "mean", {"query": "", "document": ""})
    found = read_preset(str(path), {})
    assert (found.query_prompt, found.document_prompt) == ("query: ", "passage: ")


def test_given_fields_win_over_files_and_table(folder):
    path = folder("e5-base-v2", model_type="bert")
    write_sentence_transformers(path, "cls", {"query": "q> "})
    found = read_preset(str(path), {}, Preset(pooling="last", query_prompt=""))
    assert (found.pooling, found.query_prompt, found.document_prompt) == ("last", "", "passage: ")


def test_a_given_name_stands_for_the_finding(folder):
    path = folder("e5-base-v2", model_type="bert")
    write_sentence_transformers(path, "cls")
    found = read_preset(str(path), {}, "gte")
    assert (found.pooling, found.query_prompt) == ("cls", "")  # the files' pooling, gte's prompt
    with pytest.raises(
        ValueError, match="preset='e6': accepted are a Preset and e5, multilingual-"
    ):
        read_preset(str(path), {}, "e6")
    with pytest.raises(ValueError, match="preset=7: accepted are a Preset and e5, "):
        read_preset(str(path), {}, 7)


def test_found_by_what_it_was_made_from(folder):
    path = folder("mine", model_type="bert", _name_or_path="intfloat/e5-base-v2")
    assert read_preset(str(path), {}).query_prompt == "query: "
    base = folder("e5-mistral-7b-instruct", model_type="mistral")
    adapter = folder("adapter")
    (adapter / "config.json").unlink()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert read_preset(str(adapter), {}).end_token == "</s>"


def test_unknown_checkpoints(folder):
    encoder = read_preset(str(folder("encoder", model_type="roberta")), {})
    assert encoder == Preset(
        "cls", True, prompt="", attention="own", lower_case=False, pools_prompt=True
    )
    decoder = str(folder("decoder", model_type="mistral"))
    with pytest.raises(ValueError, match=r"how .*decoder \(mistral\) is pooled; .* e5, .*a Preset"):
        read_preset(decoder, {})
    assert read_preset(decoder, {}, Preset(pooling="last")).normalize
    assert read_preset(decoder, {}, "e5-mistral").end_token == "</s>"


@pytest.mark.parametrize(
    ("mode", "pooling", "eos_text"),
    [
        ("mean", "mean", " </s>"),
        ("weighted_mean", "weighted_mean", " </s>"),
        ("eos_token", "last", " </s>"),
        ("last_token", "last", ""),
    ],
)
def test_llm2vec_config(folder, mode, pooling, eos_text):
    path = folder("LLM2Vec-Mistral-7B-Instruct-v2-mntp", model_type="mistral")
    config = {"pooling_mode": mode, "max_length": 60, "doc_max_length": 40}
    (path / "llm2vec_config.json").write_text(json.dumps({**config, "skip_instruction": False}))
    found = read_preset(str(path), {})
    assert (found.pooling, found.eos_text, found.pools_prompt) == (pooling, eos_text, True)
    assert (found.max_length, found.text_max_length) == (60, 40)
    assert found.wrap == ("[INST] ", " [/INST]")
    assert found.attention == "bidirectional"


def test_llm2vec_config_alone_tells_the_family(folder):
    path = folder("merged", model_type="llama")
    (path / "llm2vec_config.json").write_text("{}")
    found = read_preset(str(path), {})
    assert found.filled(Preset(wrap=("", ""), eos_text=" </s>")) == PRESETS["llm2vec"].filled(found)
    (path / "llm2vec_config.json").write_text('{"pooling_mode": "bos_token"}')
    with pytest.raises(
        ValueError, match="pooling_mode bos_token; accepted are mean, weighted_mean"
    ):
        read_preset(str(path), {})


def test_an_adapter_on_an_adapter(folder):
    # LLM2Vec's final adapters name the original model, but belong on top of the -mntp adapter.
    plain = str(folder("plain", model_type="llama"))
    for name in ("LLM2Vec-Sheared-LLaMA-mntp", "LLM2Vec-Sheared-LLaMA-mntp-supervised"):
        path = folder(name)
        (path / "config.json").unlink()
        adapter = {"base_model_name_or_path": plain}
        (path / "adapter_config.json").write_text(json.dumps(adapter))
        expected = replace(PRESETS["llm2vec"], prompt="", lower_case=False)
        assert read_preset(str(path), {}) == expected
    below = str(path).removesuffix("-supervised")
    assert adapter_base(f"{path}/", adapter, {}) == (below, {"revision": "main"})
    mine, hub = {**adapter, "revision": "v1"}, {"token": "x", "revision": "v2"}
    assert adapter_base("mine-supervised", mine, hub) == (plain, {"token": "x", "revision": "v1"})
