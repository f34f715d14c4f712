"""SentenceTransformer: its transformer without padding, pooling and normalisation in one kernel.

Only the class of the SentenceTransformer and of the model inside are swapped. The modules between
keep theirs, because `save` writes their class names into modules.json.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator

import sentence_transformers
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from embedfuse.integrations.end_token import EndsTexts
from embedfuse.ops import pool_normalize
from embedfuse.patching.check import deviations, evaluating
from embedfuse.patching.engine import Options
from embedfuse.patching.packed_model import PackedModel
from embedfuse.patching.report import Report

_ORIGINAL = sentence_transformers.SentenceTransformer
# Its name there -> ours.
_POOLINGS = {
    "cls": "cls",
    "lasttoken": "last",
    "mean": "mean",
    "weightedmean": "weighted_mean",
}
# Features that the pooled path understands; any other sends the call through the modules.
_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
_FEATURES = _INPUTS | {"modality", "prompt_length"}
_OUTPUT_VALUE = list(inspect.signature(_ORIGINAL.encode).parameters).index("output_value") - 1
_VECTOR = "sentence_embedding"
_PROBE_TEXTS = (
    "One",
    "Two short words",
    "A somewhat longer text, so that padding has to be dropped.",
)

# Set while `encode` wants nothing but the pooled vector.
_pooled_only = contextvars.ContextVar("embedfuse_pooled_only", default=False)


@contextlib.contextmanager
def _pooled(only: bool) -> Iterator[None]:
    token = _pooled_only.set(only)
    try:
        yield
    finally:
        _pooled_only.reset(token)


class SentenceTransformer(EndsTexts, _ORIGINAL):
    original = _ORIGINAL

    @classmethod
    def held(cls, model: _ORIGINAL) -> nn.Module:
        return transformers_model(model)

    @classmethod
    def wrap(cls, model: _ORIGINAL, report: Report, options: Options) -> None:
        cls.swap_in(model, report, options)
        pooling = getattr(model[1], "pooling_mode", None) if len(model) > 1 else None
        model.repair_end(last_token=pooling == "lasttoken")
        features = dict(model.preprocess(list(_PROBE_TEXTS)))
        for name, value in features.items():
            features[name] = value.to(model.device) if isinstance(value, Tensor) else value
        with evaluating(model):
            expected = _ORIGINAL.forward(model, dict(features))
        pooling = model._fused_pooling(features)
        if pooling is None:
            report.refused["pooling"] = "not a Transformer, one standard Pooling, and a known rest"
        else:
            report.fused.append(f"{pooling} pooling and normalisation in one kernel")
        with _pooled(only=True), evaluating(model):
            found = model.forward(dict(features))
        if _VECTOR in expected:
            report.deviations |= deviations(model, {_VECTOR: expected[_VECTOR]}, found)

    @functools.wraps(_ORIGINAL.encode)
    def encode(self, *args, **kwargs):
        wanted = kwargs.get(
            "output_value", args[_OUTPUT_VALUE] if len(args) > _OUTPUT_VALUE else ""
        )
        with _pooled(only=wanted in ("", _VECTOR)):
            return super().encode(*args, **kwargs)

    @functools.wraps(_ORIGINAL.forward)
    def forward(self, input, **kwargs):
        pooling = self._fused_pooling(input) if _pooled_only.get() and not kwargs else None
        call = {name: input[name] for name in _INPUTS & set(input)}
        found = pooling and self[0].model.packed_states(call, pooling, count=False)
        if not found:
            return super().forward(input, **kwargs)
        states, packed = found
        rest = list(self)[2:]
        normalize = bool(rest) and type(rest[0]) is Normalize
        features = dict(input)
        features[_VECTOR] = pool_normalize(
            states, cu_seqlens=packed.cu_seqlens, pooling=pooling, normalize=normalize
        )
        for module in rest[normalize:]:
            features = module(features)
        return features

    def _fused_pooling(self, features: dict) -> str | None:
        """The pooling that one kernel can do instead of the modules; None where they have to run."""
        modules = list(self)
        if len(modules) < 2 or type(modules[1]) is not Pooling or not set(features) <= _FEATURES:
            return None
        transformer, pooling, *rest = modules
        excludes_prompt = not pooling.include_prompt and "prompt_length" in features
        if not isinstance(transformer.model, PackedModel) or excludes_prompt:
            return None
        if transformer.modality_config.get("text") != _TEXT or any(map(_is_special, modules)):
            return None
        if any(getattr(m, "module_input_name", _VECTOR) != _VECTOR for m in rest):
            return None
        if any(type(m) not in (Dense, Normalize) for m in rest):
            return None
        mask = features.get("attention_mask")
        if pooling.pooling_mode == "weightedmean" and mask is not None and not mask[:, 0].all():
            return None  # sentence-transformers before 6.1 counts from column 0 there
        return _POOLINGS.get(pooling.pooling_mode)


def transformers_model(model: nn.Sequential) -> nn.Module:
    """The transformers model that the pipeline starts with. TypeError where it has none."""
    inner = getattr(model[0], "model", None)
    if type(model[0]) is not Transformer or not isinstance(inner, nn.Module):
        raise TypeError(
            f"model: its first module is {type(model[0]).__name__}; accepted is Transformer"
        )
    return inner


_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


def _is_special(module: nn.Module) -> bool:
    """Whether somebody hooked or replaced the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
