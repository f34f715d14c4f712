"""What sentence-transformers' files beside a checkpoint say about pooling."""

import json
from dataclasses import dataclass

from transformers.utils import cached_file

# Name in 1_Pooling/config.json, since sentence-transformers 6 and before -> pooling of ops.pool_normalize.
_POOLINGS = {
    "cls": "cls",
    "mean": "mean",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
# Names that sentence-transformers has had for one file.
_TEXT_FILES = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


@dataclass(frozen=True)
class Settings:
    """pooling: as in ops.pool_normalize. max_length: tokens of a text; None: nothing is said.
    lower_case: whether texts are lowercased first. prompt: what stands before every text."""

    pooling: str = "cls"
    normalize: bool = True
    max_length: int | None = None
    lower_case: bool = False
    prompt: str = ""


def read_settings(model: str, hub: dict) -> Settings:
    """The settings of a folder or hub name; the defaults where it has no such files.

    Raises ValueError for modules or poolings that embedfuse does not have.
    """

    def read(file: str) -> dict | list | None:
        path = cached_file(model, file, _raise_exceptions_for_missing_entries=False, **hub)
        if path is None:
            return None
        with open(path, encoding="utf-8") as opened:
            return json.load(opened)

    modules = read("modules.json")
    if modules is None:
        return Settings()
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ValueError(
            f"model: modules.json lists {', '.join(kinds)}; accepted are Transformer, Pooling and, "
            "at the end, Normalize"
        )
    file = f"{modules[1]['path']}/config.json"
    pooling = read(file)
    if pooling is None:
        raise ValueError(f"model: modules.json names {file}, which is not there")
    wanted = pooling.get("pooling_mode") or [
        name for name, on in pooling.items() if name.startswith("pooling_mode_") and on
    ]
    names = [wanted] if isinstance(wanted, str) else wanted
    if len(names) != 1 or names[0] not in _POOLINGS:
        raise ValueError(f"model: pooling {names}; accepted is one of {', '.join(_POOLINGS)}")
    texts = next(filter(None, map(read, _TEXT_FILES)), {})
    library = read("config_sentence_transformers.json") or {}
    prompt = library.get("default_prompt_name")
    return Settings(
        _POOLINGS[names[0]],
        kinds[2:] == ["Normalize"],
        texts.get("max_seq_length"),
        bool(texts.get("do_lower_case")),
        library["prompts"][prompt] if prompt else "",
    )
