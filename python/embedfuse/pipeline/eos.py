"""The end token of a text: detect a tokenizer that does not add it, and make it do so.

A last-token model pools the state of its end token. With transformers >= 5 the published tokenizer of
E5-mistral adds none, although its config says add_eos_token, and the last word is pooled without any
warning (embeddings-benchmark/mteb pull request 5237).
"""

import json
import logging
from dataclasses import dataclass

from tokenizers import Tokenizer

from embedfuse.pipeline.checkpoint import read_json

logger = logging.getLogger("embedfuse")
_PROBES = ("a", "")


@dataclass(frozen=True)
class AppendedEnd:
    """A tokenizer that was changed to append a token.

    Attributes:
        tokenizer: of transformers.
        token: what it appends.
        before: settings of its post-processor before the change; None if it had none.
        after: settings after the change.
    """

    tokenizer: object
    token: str
    before: dict | None
    after: dict

    def undo(self) -> None:
        """Restore the post-processor, unless it was replaced in the meantime."""
        backend = self.tokenizer.backend_tokenizer
        if _settings_of(backend.post_processor) == self.after:
            backend.post_processor = _post_processor(self.before)


def says_add_eos(name_or_path: str, hub: dict) -> bool:
    """Whether tokenizer_config.json says that the tokenizer appends its eos_token.

    transformers >= 5 ignores the file's add_eos_token if there is a tokenizer.json. False if there is no
    such file (any more), as for a tokenizer made in memory.
    """
    try:
        config = read_json(name_or_path, "tokenizer_config.json", hub)
    except OSError:
        return False
    return config is not None and config.get("add_eos_token") is True


def lacks_end(tokenizer, token: str) -> bool:
    """Whether the tokenizer does not end every text in `token`. ValueError if it does not know the token."""
    end = tokenizer.get_vocab().get(token)
    if end is None:
        raise ValueError(f"end_token={token!r}: accepted is a token of the tokenizer's vocabulary")
    return any(tokenizer(text)["input_ids"][-1:] != [end] for text in _PROBES)


def append_end(tokenizer, token: str) -> AppendedEnd:
    """Change the tokenizer so that it ends every text in `token`, within the truncated length.

    Each text of a pair gets one, as in transformers < 5.

    Raises:
        ValueError: A tokenizer written in Python, or a post-processor that cannot be extended.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} is written in Python and does not append {token}; "
            "accepted is a fast tokenizer, or one that does"
        )
    original = backend.post_processor
    before = _settings_of(original)
    end = {"id": token, "ids": [tokenizer.get_vocab()[token]], "tokens": [token]}
    backend.post_processor = _post_processor(_with_end(before, end))
    if lacks_end(tokenizer, token):
        backend.post_processor = original
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} cannot be made to append {token}")
    logger.warning(
        "%s: the tokenizer adds no %s, which the checkpoint wants at the end of every text; appended",
        tokenizer.name_or_path,
        token,
    )
    return AppendedEnd(tokenizer, token, before, _settings_of(backend.post_processor))


def _with_end(settings: dict | None, end: dict) -> dict:
    """Settings of a post-processor that also appends a token to every text."""
    kind = None if settings is None else settings["type"]
    if kind == "TemplateProcessing":
        single, pair = list(settings["single"]), []
        for piece in settings["pair"]:
            pair.append(piece)
            if piece.get("Sequence", {}).get("id") == "A":
                pair.append(_piece(end, type_id=piece["Sequence"]["type_id"]))
        last = pair[-1].get("Sequence") or pair[-1]["SpecialToken"]
        return {
            **settings,
            "single": [*single, _piece(end, type_id=0)],
            "pair": [*pair, _piece(end, type_id=last["type_id"])],
            "special_tokens": {**settings["special_tokens"], end["id"]: end},
        }
    if kind == "Sequence" and settings["processors"]:
        *others, last = settings["processors"]
        return {**settings, "processors": [*others, *_flat(_with_end(last, end))]}
    template = _with_end(_NO_SPECIAL_TOKENS, end)
    if kind is None or settings == {"type": "Sequence", "processors": []}:
        return template
    if kind == "ByteLevel":
        return {"type": "Sequence", "processors": [settings, template]}
    raise ValueError(
        f"tokenizer: its post-processor is {kind}; accepted for appending {end['id']} are "
        "TemplateProcessing, ByteLevel and none"
    )


_NO_SPECIAL_TOKENS = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def _piece(end: dict, type_id: int) -> dict:
    return {"SpecialToken": {"id": end["id"], "type_id": type_id}}


def _flat(settings: dict) -> list[dict]:
    return settings["processors"] if settings["type"] == "Sequence" else [settings]


def _settings_of(post_processor) -> dict | None:
    return None if post_processor is None else json.loads(post_processor.__getstate__())


def _post_processor(settings: dict | None):
    """A post-processor with these settings; tokenizers only reads one as part of a whole tokenizer."""
    empty = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    whole = {"version": "1.0", "added_tokens": [], "model": empty, "post_processor": settings}
    return Tokenizer.from_str(json.dumps(whole)).post_processor
