"""Texts to token ids, without tokenising more of a long text than the model will read."""

import json
import re
import threading
from collections.abc import Sequence

# Characters to tokenise first, per token needed. English has about 4, so once is nearly always enough.
_CHARACTERS_PER_TOKEN = 8
# No token and no normaliser spans a space between two of these characters.
_BORDER = re.compile(r"(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")
_LOCAL_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Lowercase", "StripAccents"),
    *("BertNormalizer", "Prepend", "Strip"),
}
_IDS_ONLY = {"return_attention_mask": False, "return_token_type_ids": False}
_SPLITS_AT_SPACES = {"WhitespaceSplit", "Whitespace", "BertPreTokenizer"}


def check_texts(texts: Sequence[str], name: str = "texts", start: int = 0) -> None:
    """TypeError or ValueError for a text that no tokenizer accepts, with its index, counted from `start`."""
    for i, text in enumerate(texts, start):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}]: {type(text).__name__}; accepted is str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}[{i}]: lone surrogate {text[error.start]!r} at {error.start}; accepted is "
                "text that UTF-8 can encode"
            ) from None


class TextTokenizer:
    """A transformers tokenizer made thread-safe, which tokenises no more of a text than needed.

    The tokenizer is used as it is at each call, so later changes to it take effect.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # truncation is a setting of the tokenizer, not of the call

    def __call__(
        self, texts: Sequence[str], max_length: int, special: bool = True
    ) -> list[list[int]]:
        """Token ids of each text, truncated to max_length.

        special: whether to add the special tokens, which count towards max_length.
        """
        with self._lock:
            limit = max_length * _CHARACTERS_PER_TOKEN
            long = [i for i, text in enumerate(texts) if len(text) > limit]
            added = self.tokenizer.num_special_tokens_to_add() if long and special else 0
            # If max_length is below the number of special tokens, fast tokenizers do not truncate.
            if not long or max_length < added or not cuts_are_exact(self.tokenizer):
                return self._ids(texts, max_length, special)
            read = list(texts)
            for i in long:
                read[i] = beginning(texts[i], limit)
            ids = self._ids(read, max_length, special)
            # Too few tokens from a part of the text: read twice as much.
            while long := [
                i for i in long if len(ids[i]) < max_length and len(read[i]) < len(texts[i])
            ]:
                for i in long:
                    read[i] = beginning(texts[i], 2 * len(read[i]))
                    ids[i] = self._ids([read[i]], max_length, special)[0]
            return ids

    def pairs(
        self, firsts: Sequence[str], seconds: Sequence[str], max_length: int
    ) -> list[list[int]]:
        """Token ids of pairs of texts. The second text is cut if a pair is longer than max_length.

        An empty second text counts as none, as transformers does for a single pair (not for a batch).
        """
        call = {"truncation": "only_second", "max_length": max_length, **_IDS_ONLY}
        with self._lock:
            ids = self.tokenizer(list(firsts), list(seconds), **call)["input_ids"]
            for i in [i for i, second in enumerate(seconds) if not second]:
                ids[i] = self.tokenizer(firsts[i], "", **call)["input_ids"]
        return ids

    def _ids(self, texts: Sequence[str], max_length: int, special: bool) -> list[list[int]]:
        cut = {"truncation": True, "max_length": max_length}
        call = {"add_special_tokens": special, **cut, **_IDS_ONLY}
        return self.tokenizer(list(texts), **call)["input_ids"]


def beginning(text: str, characters: int) -> str:
    """The text up to the first border at or after `characters`; all of it if there is none."""
    border = _BORDER.search(text, characters)
    return text if border is None else text[: border.start()]


def cuts_are_exact(tokenizer) -> bool:
    """Whether the tokens of `beginning(text, ...)` are always the first tokens of the text.

    They are if truncation keeps the beginning, normalisers depend on adjacent characters only, and the
    text is first split at spaces. Unknown components count as no.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in Python have none
    if backend is None or tokenizer.truncation_side != "right" or backend.pre_tokenizer is None:
        return False
    if any(" " in token.content for token in backend.get_added_tokens_decoder().values()):
        return False
    if not all(map(_is_local, _parts(backend.normalizer, "normalizers"))):
        return False
    first = _parts(backend.pre_tokenizer, "pretokenizers")[0]
    return (
        first["type"] in _SPLITS_AT_SPACES
        or (first["type"] == "Metaspace" and first.get("split", True))
        or (first["type"] == "ByteLevel" and first.get("use_regex", True))
    )


def _parts(component, name: str) -> list[dict]:
    """The settings of a normaliser or pre-tokenizer, or of each in a sequence of them."""
    if component is None:
        return []
    return _flat(json.loads(component.__getstate__()), name)


def _flat(settings: dict, name: str) -> list[dict]:
    if settings["type"] != "Sequence":
        return [settings]
    return [part for inner in settings[name] for part in _flat(inner, name)]


def _is_local(normalizer: dict) -> bool:
    """Whether its result at a character depends on adjacent characters only."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"]
        return pattern.get("Regex") == " {2,}" or " " not in pattern.get("String", " ")
    return normalizer["type"] in _LOCAL_NORMALIZERS
