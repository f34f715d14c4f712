"""The preset of a checkpoint, read from its files: pooling, prompts and lengths."""

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace

from transformers.utils import cached_file

from embedfuse.pipeline.presets import PRESETS, Preset, find_preset

# Name in 1_Pooling/config.json (of sentence-transformers 6, and before) -> pooling of ops.pool_normalize.
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
_LLM2VEC_POOLINGS = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "eos_token": "last",
    "last_token": "last",
}
# Names that sentence-transformers has used for one file.
_TEXT_FILES = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
# The names under which sentence-transformers' encode_document looks for its prompt.
_DOCUMENT = ("document", "passage", "corpus")
_ENCODERS = ("bert", "roberta", "xlm-roberta")
_ENCODER_DEFAULT = Preset(pooling="cls")
_DEFAULT = Preset(normalize=True, prompt="", attention="own", lower_case=False, pools_prompt=True)
Read = Callable[[str], "dict | list | None"]


def read_preset(model: str, hub: dict, given: str | Preset | None = None) -> Preset:
    """How to use a checkpoint. Each field comes from the first of these that has a value for it:

    1. `given`, if it is a Preset;
    2. the files of LLM2Vec and sentence-transformers next to the weights;
    3. the entry of PRESETS that `given` names, or else the one for the checkpoint's name and model type,
       or for the model that its config or adapter says it was made from;
    4. for encoders: pool the first token, normalised.

    Args:
        model: folder or hub name.
        hub: arguments of transformers' from_pretrained (revision, token, ...).
        given: a Preset, or a name in PRESETS.

    Raises:
        ValueError: A decoder whose pooling nothing says (with causal attention its first token sees only
            itself, so there is no safe default), an unknown preset name, or modules or a pooling that
            embedfuse does not support.
        OSError: No checkpoint there; FileNotFoundError for a path that is no folder.
    """
    if given is not None and not isinstance(given, Preset) and given not in PRESETS:
        raise ValueError(f"preset={given!r}: accepted are a Preset and {', '.join(PRESETS)}")
    # No name on the hub begins like that or has two slashes.
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    if is_path and not os.path.isdir(model):
        raise FileNotFoundError(
            f"model: there is no folder {model}; accepted are folders and hub names"
        )
    read = functools.partial(read_json, model, hub=hub)
    names, config = [model], read("config.json") or {}
    name, base_hub = model, hub
    while adapter := read_json(name, "adapter_config.json", base_hub):
        name, base_hub = adapter_base(name, adapter, base_hub)
        names.append(name)
        config = read_json(name, "config.json", base_hub) or config
    if made_from := config.get("_name_or_path"):
        names.append(made_from)
    model_type = config.get("model_type")
    preset = given if isinstance(given, Preset) else Preset()
    preset = preset.filled(read_llm2vec(read)).filled(read_sentence_transformers(read))
    entry = PRESETS[given] if isinstance(given, str) else find_preset(names, model_type)
    preset = preset.filled(entry)
    if model_type in _ENCODERS:
        preset = preset.filled(_ENCODER_DEFAULT)
    if preset.pooling is None:
        if not config:
            raise OSError(f"model: {model} has no config.json, or is not within reach")
        raise ValueError(
            f"model: nothing says how {model} ({model_type}) is pooled; accepted as preset are "
            f"{', '.join(PRESETS)}, and a Preset with pooling"
        )
    return preset.filled(_DEFAULT)


def read_json(model: str, file: str, hub: dict) -> dict | list | None:
    """The content of a JSON file of a folder or hub name; None if there is no such file."""
    path = cached_file(model, file, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        return None
    with open(path, encoding="utf-8") as opened:
        return json.load(opened)


def adapter_base(model: str, adapter: dict, hub: dict) -> tuple[str, dict]:
    """The base model of a PEFT adapter, and the from_pretrained arguments to load it with.

    LLM2Vec's final adapters name the original model, but belong on top of its -mntp adapter, which is
    published next to them (README of McGill-NLP/llm2vec).
    """
    on_mntp = re.fullmatch(
        r"(.*llm2vec-[^/]*-mntp)-(supervised|unsup-simcse)/?", model, re.IGNORECASE
    )
    base = on_mntp[1] if on_mntp else adapter["base_model_name_or_path"]
    revision = None if on_mntp else adapter.get("revision")
    return base, {**hub, "revision": revision or "main"}


def read_sentence_transformers(read: Read) -> Preset:
    """The preset in modules.json and the files that it names; an empty Preset if there are none.

    An empty prompt counts as none: sentence-transformers writes one into every model that it saves.
    """
    modules = read("modules.json")
    if modules is None:
        return Preset()
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
    if pooling.get("include_prompt") is False and _POOLINGS[names[0]] != "last":
        raise ValueError(
            f"model: {file} says include_prompt: false; accepted with {names[0]} pooling is true, prompts "
            "pooled with their texts. A patched SentenceTransformer leaves them out"
        )
    texts = next(filter(None, map(read, _TEXT_FILES)), {})
    library = read("config_sentence_transformers.json") or {}
    prompts = library.get("prompts") or {}
    return Preset(
        pooling=_POOLINGS[names[0]],
        normalize=kinds[2:] == ["Normalize"],
        max_length=texts.get("max_seq_length"),
        prompt=prompts.get(library.get("default_prompt_name")) or None,
        query_prompt=prompts.get("query") or None,
        document_prompt=next((prompts[name] for name in _DOCUMENT if prompts.get(name)), None),
        lower_case=texts.get("do_lower_case"),
    )


def read_llm2vec(read: Read) -> Preset:
    """The preset in llm2vec_config.json, with the defaults of LLM2Vec; an empty Preset without the file."""
    config = read("llm2vec_config.json")
    if config is None:
        return Preset()
    mode = config.get("pooling_mode", "mean")
    if mode not in _LLM2VEC_POOLINGS:
        raise ValueError(f"model: pooling_mode {mode}; accepted are {', '.join(_LLM2VEC_POOLINGS)}")
    return replace(
        PRESETS["llm2vec"],
        pooling=_LLM2VEC_POOLINGS[mode],
        max_length=config.get("max_length", 512),
        text_max_length=config.get("doc_max_length", 400),
        pools_prompt=not config.get("skip_instruction", True),
        wrap=None,  # depends on the base model
        eos_text="" if mode == "last_token" else None,
    )
