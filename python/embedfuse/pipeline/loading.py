"""A checkpoint's model and tokenizer, from a folder or hub name."""

import warnings

import torch
from tokenizers import normalizers
from torch import nn
from transformers import AutoModel, AutoTokenizer

from embedfuse.pipeline.checkpoint import adapter_base, read_json
from embedfuse.pipeline.eos import append_end, lacks_end, says_add_eos
from embedfuse.pipeline.presets import Preset


def load_model(model: str, dtype: torch.dtype, hub: dict) -> nn.Module:
    """The transformers model in eval mode. A PEFT adapter is merged into its base model.

    Raises:
        ValueError: An adapter that cannot be merged or does not fit the base model.
    """
    adapter = read_json(model, "adapter_config.json", hub)
    if adapter is None:
        return AutoModel.from_pretrained(model, dtype=dtype, **hub).eval()
    import peft

    base_name, base_hub = adapter_base(model, adapter, hub)
    base = load_model(base_name, dtype, base_hub)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted = peft.PeftModel.from_pretrained(base, model, **hub)
        except (UserWarning, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"model: the adapter {model} does not fit {type(base).__name__}"
            ) from error
    if not hasattr(adapted, "merge_and_unload"):
        raise ValueError(
            f"model: {model} is an adapter of kind {adapter.get('peft_type')}; accepted are those that "
            "peft merges into the weights"
        )
    return adapted.merge_and_unload().eval()


def load_tokenizer(model: str, preset: Preset, strict: bool, hub: dict):
    """The tokenizer, changed to add the end token if the checkpoint expects one and it adds none."""
    tokenizer = AutoTokenizer.from_pretrained(model, **hub)
    if preset.lower_case:
        backend = tokenizer.backend_tokenizer
        others = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
    end = preset.end_token or (tokenizer.eos_token if says_add_eos(model, hub) else None)
    if end and lacks_end(tokenizer, end):
        if strict:
            raise ValueError(
                f"tokenizer: it adds no {end} to a text, though the checkpoint wants one there; "
                "strict=False has it added"
            )
        append_end(tokenizer, end)
    return tokenizer
