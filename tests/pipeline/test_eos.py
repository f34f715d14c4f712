"""A tokenizer that does not add the end token is changed to add it; one that does is not changed."""

import copy
import json
import logging
import pickle

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from embedfuse import Embedder
from embedfuse.pipeline.eos import append_end, lacks_end, says_add_eos
from embedfuse.pipeline.tokenize import TextTokenizer
from tests.pipeline.families import (
    make,
    write_llama_tokenizer,
    write_qwen_tokenizer,
    write_sentence_transformers,
)

ADDS = {"add_bos_token": True, "add_eos_token": True}
WORDS = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5}
# Ids of "a b c", of it cut to 3 tokens, of "", and of the pair ("a", "b").
PLAIN = ([3, 4, 5, 1], [3, 4, 1], [1], [3, 1, 4, 1])
BOS = ([0, 3, 4, 5, 1], [0, 3, 1], [0, 1], [0, 3, 1, 0, 4, 1])


def template(single, pair):
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 1)]
    )


def tokenizer(post_processor, **settings) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post_processor is not None:
        backend.post_processor = post_processor
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **settings)


def ids(tokenizer):
    cut = tokenizer("a b c", truncation=True, max_length=3)
    calls = (tokenizer("a b c"), cut, tokenizer(""), tokenizer("a", "b"))
    return tuple(call["input_ids"] for call in calls)


BOS_TEMPLATE = template("<s> $A", "<s> $A <s>:1 $B:1")


@pytest.mark.parametrize(
    ("post_processor", "expected"),
    [
        (None, PLAIN),
        (BOS_TEMPLATE, BOS),
        (processors.ByteLevel(), PLAIN),
        (processors.Sequence([]), PLAIN),
        (processors.Sequence([processors.ByteLevel()]), PLAIN),
        (processors.Sequence([processors.ByteLevel(), BOS_TEMPLATE]), BOS),
    ],
    ids=str,
)
def test_append_and_undo(post_processor, expected, caplog):
    tok = tokenizer(post_processor)
    before = ids(tok)
    state = tok.backend_tokenizer.to_str()
    assert lacks_end(tok, "</s>")
    with caplog.at_level(logging.WARNING, "embedfuse"):
        appended = append_end(tok, "</s>")
    assert len(caplog.records) == 1
    assert "adds no </s>" in caplog.text
    assert not lacks_end(tok, "</s>")
    assert ids(tok) == expected
    assert tok("a b c", add_special_tokens=False)["input_ids"] == [3, 4, 5]
    assert tok("a </s>")["input_ids"][-3:] == [3, 1, 1]  # as text it is one more token
    masks = tok(["a", "a b c"], padding=True, padding_side="left", return_special_tokens_mask=True)
    assert masks["attention_mask"][0] == [0, 0] + [1] * (len(expected[0]) - 2)
    assert masks["special_tokens_mask"][1] == [int(i < 2) for i in expected[0]]
    appended.undo()
    assert ids(tok) == before
    assert tok.backend_tokenizer.to_str() == state


def test_type_ids_of_a_pair():
    tok = tokenizer(BOS_TEMPLATE, model_input_names=["input_ids", "token_type_ids"])
    append_end(tok, "</s>")
    assert tok("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "post_processor",
    [
        template("<s> $A </s>", "<s> $A </s> $B </s>"),
        processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
    ],
)
def test_nothing_lacks(post_processor):
    assert not lacks_end(tokenizer(post_processor), "</s>")


def test_what_cannot_be_repaired():
    tok = tokenizer(processors.RobertaProcessing(("</s>", 1), ("<s>", 0)))
    assert lacks_end(tok, "<s>")
    with pytest.raises(ValueError, match="post-processor is RobertaProcessing; accepted"):
        append_end(tok, "<s>")
    with pytest.raises(ValueError, match="end_token='<eos>': accepted is a token of the"):
        lacks_end(tok, "<eos>")

    class Slow:
        name_or_path = "slow"

    with pytest.raises(ValueError, match="Slow is written in Python and does not append </s>"):
        append_end(Slow(), "</s>")


def test_only_the_file_says_add_eos(tmp_path):
    for config, expected in ((ADDS, True), ({"add_eos_token": False}, False), ({}, False)):
        write_llama_tokenizer(tmp_path, **config)
        assert says_add_eos(str(tmp_path), {}) is expected
    (tmp_path / "tokenizer_config.json").unlink()
    assert not says_add_eos(str(tmp_path), {})
    assert not says_add_eos(str(tmp_path / "gone"), {})
    assert not says_add_eos("", {})


def test_long_texts_are_still_read_in_part(m3_tokenizer):
    tok = copy.deepcopy(m3_tokenizer)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    append_end(tok, "</s>")
    text = "all work and no play " * 5000
    for length in (3, 16, 100):
        found = TextTokenizer(tok)([text, "short"], length)[0]
        assert found == tok(text, truncation=True, max_length=length)["input_ids"]
        assert (len(found), found[0], found[-1]) == (length, 0, 2)
        assert found[1:-1] == m3_tokenizer(text)["input_ids"][1 : length - 1]


def test_copies_keep_the_end():
    tok = tokenizer(BOS_TEMPLATE)
    appended = append_end(tok, "</s>")
    for again in (copy.deepcopy(appended), pickle.loads(pickle.dumps(appended))):
        assert ids(again.tokenizer) == BOS
        again.undo()
        assert again.tokenizer("a")["input_ids"] == [0, 3]
    assert ids(tok) == BOS


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """E5-mistral's layout: the config wants </s>, tokenizer.json adds <s> alone."""
    folder = make(tmp_path_factory.mktemp("e5") / "e5-mistral-7b-instruct", "mistral")
    write_llama_tokenizer(folder, **ADDS)
    return folder


def test_the_published_layout_lacks_its_eos(mistral):
    # If this fails, transformers adds </s> again, and the guard has nothing to do.
    tok = AutoTokenizer.from_pretrained(str(mistral))
    assert tok("some text")["input_ids"][0] == tok.bos_token_id
    assert tok("some text")["input_ids"][-1] != tok.eos_token_id


def test_embedder_repairs_and_says_so_once(mistral, caplog):
    embedder = Embedder(str(mistral), device="cpu")
    assert caplog.text.count("adds no </s>") == 1
    for text in ("", "x", "a longer text that is cut " * 200):
        found = embedder.tokenizer(text, truncation=True, max_length=20)["input_ids"]
        assert (found[0], found[-1], found.count(2)) == (1, 2, 1)
    embedder.encode(["a", "b"])
    assert caplog.text.count("adds no") == 1


def test_strict_raises(mistral):
    with pytest.raises(ValueError, match="tokenizer: it adds no </s> to a text, though"):
        Embedder(str(mistral), device="cpu", strict=True)


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>"])
def test_a_tokenizer_that_adds_it_is_left_alone(tmp_path, template, caplog):
    folder = make(tmp_path / "e5-mistral-7b-instruct", "mistral")
    write_llama_tokenizer(folder, template, **ADDS)
    plain = AutoTokenizer.from_pretrained(str(folder))
    embedder = Embedder(str(folder), device="cpu", strict=True)
    assert embedder.tokenizer("some text")["input_ids"] == plain("some text")["input_ids"]
    assert embedder.tokenizer("some text")["input_ids"][-1] == 2
    assert "adds no" not in caplog.text


@pytest.mark.parametrize("says", [True, False])
def test_the_config_of_an_unknown_checkpoint(tmp_path, says, caplog):
    folder = make(tmp_path / "mine", "llama")
    write_llama_tokenizer(folder, add_bos_token=True, add_eos_token=says)
    write_sentence_transformers(folder, "lasttoken")
    embedder = Embedder(str(folder), device="cpu")
    assert (embedder.tokenizer("text")["input_ids"][-1] == 2) is says
    assert ("adds no </s>" in caplog.text) is says


@pytest.mark.parametrize("end", ["", "<|endoftext|>", "<|im_end|>"])
def test_the_preset_knows_the_token_that_is_not_eos_token(tmp_path, end, caplog):
    folder = make(tmp_path / "Qwen3-Embedding-0.6B", "qwen3")
    write_qwen_tokenizer(folder, end)
    if end == "<|im_end|>":
        # It ends texts in another token: both are added, the expected one last.
        assert Embedder(str(folder), device="cpu").tokenizer("x")["input_ids"][-2:] == [1, 0]
        return
    embedder = Embedder(str(folder), device="cpu", strict=bool(end))
    assert embedder.tokenizer.eos_token == "<|im_end|>"
    assert embedder.tokenizer("some text")["input_ids"][-1] == 0
    assert embedder.tokenizer("")["input_ids"] == [0]
    assert ("adds no <|endoftext|>" in caplog.text) is (end == "")


def test_the_files_of_a_tokenizer_stay_as_they_are(mistral):
    before = json.loads((mistral / "tokenizer.json").read_text())
    Embedder(str(mistral), device="cpu")
    assert json.loads((mistral / "tokenizer.json").read_text()) == before
