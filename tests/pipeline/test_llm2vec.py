"""LLM2Vec's checkpoints against its rules, computed by transformers alone, one text at a time."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from embedfuse import PRESETS, Embedder, Preset
from embedfuse.packing import unpadded
from embedfuse.pipeline.llm2vec import LLM2VecTokenizer, last_tokens
from embedfuse.pipeline.tokenize import TextTokenizer
from tests.pipeline.families import TEXTS, Plain, make, write_llama_tokenizer

peft = pytest.importorskip("peft")
SEARCH = "Given a web search query, retrieve relevant passages that answer the query:"
SEPARATOR = "!@#$%^&*()"
LLAMA_3 = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
FAMILIES = {
    "LLM2Vec-Sheared-LLaMA-mntp": ("llama", "", ""),
    "LLM2Vec-Mistral-7B-Instruct-v2-mntp": ("mistral", "[INST] ", " [/INST]"),
    "LLM2Vec-Llama-2-7b-chat-hf-mntp": ("llama", "[INST] ", " [/INST]"),
    "LLM2Vec-Meta-Llama-3-8B-Instruct-mntp": ("llama", *LLAMA_3),
}
LONG = [
    "  blanks around  ",
    "\n\ttabs and\nlines ",
    " ".join(f"word{i}" for i in range(300)),
    "mixed   blanks " * 150 + "end ",
    "a " * 350,
]
ALL = [text for text in TEXTS if text] + LONG


class Rules:
    """What LLM2Vec.encode does to [instruction, text], with its separator and its embed_mask."""

    def __init__(self, folder, before, after, mode="mean", max_length=512, doc_max_length=400):
        self.plain = Plain(folder, both_ways=True)
        self.before, self.after, self.mode = before, after, mode
        self.cut = {"truncation": True, "max_length": max_length}
        self.doc_max_length = doc_max_length

    def tokens(self, text, **kwargs):
        return self.plain.tokenizer(text, **self.cut, **kwargs)["input_ids"]

    def __call__(self, instruction: str, text: str):
        while (n := len(self.tokens(text, add_special_tokens=False))) > self.doc_max_length:
            words = text.split()
            text = " ".join(words[: int(len(words) * (self.doc_max_length / n))])
        text = f"{instruction.strip()} {SEPARATOR}{text}" if instruction else SEPARATOR + text
        if self.after:
            text = self.before + text.strip() + self.after
        if self.mode == "eos_token" and self.before != LLAMA_3[0]:
            text = text.strip() + " </s>"
        first, own = text.split(SEPARATOR)
        states = self.plain.states_of(self.tokens(first + own))
        if self.mode == "eos_token":
            return states[-1]
        rows = states[-len(self.tokens(own, add_special_tokens=False)) :]
        weights = torch.arange(1, len(rows) + 1) if self.mode == "weighted_mean" else torch.ones(1)
        weights = weights.expand(len(rows)).double()
        return (rows * weights[:, None]).sum(0) / weights.sum()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    kind, before, after = FAMILIES[request.param]
    folder = make(tmp_path_factory.mktemp(kind) / request.param, kind)
    return folder, before, after


def assert_rules(found, rules, instruction, texts):
    expected = torch.stack([rules(instruction, text) for text in texts]).numpy()
    np.testing.assert_allclose(found.dense, expected, rtol=0, atol=2e-5)


def test_queries_and_documents(case):
    embedder, rules = Embedder(str(case[0]), device="cpu"), Rules(*case)
    assert embedder.max_length == 512
    assert_rules(embedder.encode_queries(ALL), rules, SEARCH, ALL)
    assert_rules(embedder.encode_queries(ALL, " Do this: "), rules, "Do this:", ALL)
    for found in (embedder.encode_documents(ALL), embedder.encode(ALL)):
        assert_rules(found, rules, "", ALL)
    assert not embedder.report.original_calls


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "eos_token"])
def test_poolings_and_lengths_of_its_file(case, tmp_path, mode):
    folder = Path(shutil.copytree(case[0], tmp_path / case[0].name))
    lengths = {"max_length": 60, "doc_max_length": 30}
    (folder / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": mode, **lengths}))
    embedder, rules = Embedder(str(folder), device="cpu"), Rules(folder, *case[1:], mode, **lengths)
    assert_rules(embedder.encode_queries(ALL, "Do this:"), rules, "Do this:", ALL)
    # Instruction and text together are longer than max_length.
    wordy = "Do this with as many words as the instruction can take: " * 2
    assert_rules(embedder.encode_queries(ALL, wordy), rules, wordy, ALL)


def test_the_instruction_is_pooled_where_the_file_says_so(case, tmp_path):
    folder = Path(shutil.copytree(case[0], tmp_path / case[0].name))
    (folder / "llm2vec_config.json").write_text('{"skip_instruction": false}')
    embedder, plain = Embedder(str(folder), device="cpu"), Plain(folder, both_ways=True)
    _, before, after = case
    states = plain.states(f"{before}Do this: {ALL[1]}{after}", 512)
    found = embedder.encode_queries(ALL[1:2], "Do this:").dense
    np.testing.assert_allclose(found[0], states.mean(0), rtol=0, atol=2e-5)


def test_texts_that_llm2vec_loses(case):
    # It cuts a text of one word to nothing, and pools the padding of a text without tokens.
    folder, before, after = case
    embedder, plain = Embedder(str(folder), device="cpu"), Plain(folder, both_ways=True)
    word = "wordwithoutblanks" * 100
    found = embedder.encode([word, "x"])
    own = len(plain.tokenizer(word + after, add_special_tokens=False)["input_ids"])
    states = plain.states(before + word + after, 512)
    np.testing.assert_allclose(found.dense[0], states[-min(own, 512) :].mean(0), rtol=0, atol=2e-5)
    if not after:
        states = plain.states("Do this: ", 512)
        found = embedder.encode_queries([""], "Do this:").dense[0]
        np.testing.assert_allclose(found, states.mean(0), rtol=0, atol=2e-5)


def test_normalised_by_a_preset(case):
    preset = Preset(normalize=True)
    dense = Embedder(str(case[0]), device="cpu", preset=preset).encode(ALL).dense
    np.testing.assert_allclose(np.linalg.norm(dense, axis=1), 1, rtol=1e-5)
    raw = Embedder(str(case[0]), device="cpu").encode(ALL).dense
    np.testing.assert_allclose(dense, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)


def adapter_folder(model, folder, base, seed):
    """Give the model an adapter, save that, and return the model with the adapter merged in."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    write_llama_tokenizer(folder)
    return adapted.merge_and_unload()


def test_adapters_over_their_base(tmp_path):
    base = make(tmp_path / "base", "mistral")
    folders = [tmp_path / f"LLM2Vec-Mistral-7B-Instruct-v2-mntp{x}" for x in ("", "-supervised")]
    model = AutoModel.from_pretrained(str(base))
    vectors = []
    for seed, folder in enumerate(folders):
        model = adapter_folder(model, folder, base, seed)
        rules = Rules(base, "[INST] ", " [/INST]")
        rules.plain.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        rules.plain.model = copy.deepcopy(model).double()
        embedder = Embedder(str(folder), device="cpu")
        found = embedder.encode_queries(ALL, "Do this:")
        assert_rules(found, rules, "Do this:", ALL)
        assert "2 layers without padding" in embedder.report.fused
        vectors.append(found.dense)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1


def test_adapters_that_do_not_fit(tmp_path):
    base = make(tmp_path / "base", "mistral")
    preset = Preset(pooling="last")
    model = AutoModelForCausalLM.from_pretrained(str(base))
    adapter_folder(model, tmp_path / "causal", base, 0)
    with pytest.raises(ValueError, match=r"the adapter .*causal does not fit MistralModel"):
        Embedder(str(tmp_path / "causal"), device="cpu", preset=preset)
    config = peft.PromptTuningConfig(
        num_virtual_tokens=2,
        task_type="FEATURE_EXTRACTION",
        base_model_name_or_path=str(base),
        token_dim=48,
        num_layers=2,
        num_attention_heads=4,
    )
    model = AutoModel.from_pretrained(str(base))
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompts")
    write_llama_tokenizer(tmp_path / "prompts")
    with pytest.raises(ValueError, match=r"prompts is an adapter of kind PROMPT_TUNING; accepted"):
        Embedder(str(tmp_path / "prompts"), device="cpu", preset=preset)


def test_megabytes_are_shortened_without_tokenising_them(case):
    embedder = Embedder(str(case[0]), device="cpu")
    seen = []
    tokenizer = embedder.tokenizer

    class Spy:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **kwargs):
            seen.extend(map(len, texts))
            return tokenizer(texts, **kwargs)

    tokenize = LLM2VecTokenizer(TextTokenizer(Spy()), PRESETS["llm2vec"])
    sequences, own = tokenize(["some words " * 200_000], "", 512)
    assert own[0] <= 400 < len(tokenizer("some words " * 400)["input_ids"])
    assert len(sequences[0]) == own[0] + 1  # and <s>
    assert max(seen) < 10_000


def test_tails():
    states = torch.arange(9.0)[:, None]
    rows, packed = last_tokens(states, unpadded([4, 1, 4], states.device), [2, 1, 3])
    assert rows[:, 0].tolist() == [2, 3, 4, 6, 7, 8]
    assert packed.lengths == (2, 1, 3)


def test_last_pools_the_last_row_alone(case, monkeypatch):
    preset = replace(PRESETS["llm2vec"], pooling="last")
    embedder = Embedder(str(case[0]), device="cpu", preset=preset)
    poolings = []
    states = type(embedder.model).sequence_states

    def spy(self, input_ids, packed, pooling=None):
        poolings.append(pooling)
        return states(self, input_ids, packed, pooling)

    monkeypatch.setattr(type(embedder.model), "sequence_states", spy)
    embedder.encode(TEXTS)
    assert poolings == ["last"]
