"""SentenceTransformer: its transformer without padding, pooling and normalisation in one kernel.

Only the classes of the SentenceTransformer and of the model inside are swapped. The modules between them
keep theirs, because `save` writes their class names into modules.json.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator

import sentence_transformers
import torch
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from embedfuse.integrations.end_token import EndsTexts
from embedfuse.integrations.probe import PROBE_TEXTS
from embedfuse.integrations.sentence_transformers.inference import QuickInference
from embedfuse.patching.check import deviations, evaluating
from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.layout import defined_in, is_hooked, replaced
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options, outlives_patch

_ORIGINAL = sentence_transformers.SentenceTransformer
_LIBRARY = "sentence_transformers"
# sentence-transformers' name -> that of ops.pool_normalize.
_POOLINGS = {
    "cls": "cls",
    "lasttoken": "last",
    "mean": "mean",
    "weightedmean": "weighted_mean",
}
# Features that the fused path takes; with any other the modules run one by one.
_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
_FEATURES = _INPUTS | {"modality", "prompt_length"}
_TOKENS, _VECTOR = "token_embeddings", "sentence_embedding"
_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}

# The model whose caller wants only the pooled vector.
_pooled_only = contextvars.ContextVar("embedfuse_pooled_only", default=None)


@contextlib.contextmanager
def _pooled(model: _ORIGINAL | None) -> Iterator[None]:
    token = _pooled_only.set(model)
    try:
        yield
    finally:
        _pooled_only.reset(token)


class SentenceTransformer(QuickInference, EndsTexts, _ORIGINAL):
    original = _ORIGINAL

    @classmethod
    def inner_model(cls, model: _ORIGINAL) -> nn.Module:
        return transformers_model(model)

    @classmethod
    def wrap(cls, model: _ORIGINAL, report: Report, options: Options) -> None:
        cls.swap_in(model, report, options)
        modes = getattr(model[1], "pooling_mode", ()) if len(model) > 1 else ()
        model.repair_end(last_token="lasttoken" in modes)
        features = dict(model.preprocess(list(PROBE_TEXTS)))
        for name, value in features.items():
            features[name] = value.to(model.device) if isinstance(value, Tensor) else value
        if why := model._unfused(features, {}):
            report.refused["pooling"] = why
            return
        report.fused.append(f"{_POOLINGS[modes]} pooling and normalisation in one kernel")
        with evaluating(model):
            expected = _ORIGINAL.forward(model, dict(features))
            with _pooled(model):
                found = model.forward(dict(features))
        report.deviations |= deviations(model, {_VECTOR: expected[_VECTOR]}, found)

    @outlives_patch
    @functools.wraps(_ORIGINAL.forward)
    def forward(self, input, **kwargs):
        if _pooled_only.get() is not self or torch.compiler.is_compiling():
            return super().forward(input, **kwargs)
        if why := self._unfused(input, kwargs):
            self._embedfuse.report.original(f"pooling by its module: {why}")
            return super().forward(input, **kwargs)
        transformer, module, *rest = self
        pooling, accepted = _POOLINGS[module.pooling_mode], transformer.model_forward_params
        names = _INPUTS if accepted is None else _INPUTS & accepted
        call = {name: input[name] for name in names & input.keys()}
        found = transformer.model.packed_states(call, pooling=pooling)
        if found is None:
            return super().forward(input, **kwargs)
        normalize = (
            bool(rest) and type(rest[0]) is Normalize and rest[0].module_output_name == _VECTOR
        )
        features = dict(input)
        features[_VECTOR] = found.pool(pooling, normalize)
        for module in rest[normalize:]:
            features = module(features)
        return features

    def _unfused(self, features: dict, kwargs: dict) -> str | None:
        """Why the modules have to run one by one; None where one kernel pools and normalises."""
        modules = list(self)
        kinds = [type(module) for module in modules]
        if kinds[:2] != [Transformer, Pooling] or not set(kinds[2:]) <= {Dense, Normalize}:
            names = ", ".join(kind.__name__ for kind in kinds)
            return (
                f"its modules are {names}; fused are Transformer, Pooling, then Dense and Normalize"
            )
        if others := features.keys() - _FEATURES:
            return f"called with {', '.join(sorted(others))}"
        if kwargs and (taken := kwargs.keys() & set(self.get_model_kwargs())):
            return f"called with {', '.join(sorted(taken))}"
        changed = [m for m in modules if is_hooked(m) or replaced(m, _LIBRARY, "forward")]
        if changed:
            return f"{type(changed[0]).__name__} has a hook or a forward of its own"
        transformer, pooling, *rest = modules
        # Their hooks would miss the token embeddings among the features.
        if (
            is_hooked(self)
            or is_hooked(transformer.model)
            or not defined_in(_LIBRARY, _ORIGINAL.forward)
        ):
            return "the model has a hook or a forward of its own"
        if not isinstance(transformer.model, PackedModel):
            return "the model inside is not patched"
        if (
            method := transformer.modality_config.get(features.get("modality", "text"))
        ) is None or (any(method.get(name) != value for name, value in _FORWARD.items())):
            return "the Transformer calls something other than the model's forward"
        if transformer.module_output_name != _TOKENS:
            return f"the Transformer writes {transformer.module_output_name}"
        accepted = transformer.model_forward_params
        if accepted is not None and "attention_mask" in features.keys() - accepted:
            return "the model does not get the attention_mask that pooling uses"
        return _unfused_pooling(pooling, features) or _unfused_rest(rest)


def _with_output_value(name: str) -> Callable:
    """A method of SentenceTransformer that lets `forward` know whether only the vector is wanted."""
    original = getattr(_ORIGINAL, name)
    place = list(inspect.signature(original).parameters).index("output_value") - 1  # without self

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        wanted = args[place] if len(args) > place else kwargs.get("output_value", _VECTOR)
        only = wanted == _VECTOR
        with _pooled(self if only else None):
            return getattr(_ORIGINAL, name)(self, *args, **kwargs)

    return method


# The method that worker processes run too: `encode` before 6.2.
_RUNS = "_inference" if hasattr(_ORIGINAL, "_inference") else "encode"
setattr(SentenceTransformer, _RUNS, _with_output_value(_RUNS))


def _unfused_pooling(pooling: Pooling, features: dict) -> str | None:
    mode = pooling.pooling_mode
    if not isinstance(mode, str) or mode not in _POOLINGS:
        return f"pooling_mode={mode!r}"
    if not pooling.include_prompt and "prompt_length" in features:
        return "include_prompt=False with a prompt"
    mask = features.get("attention_mask")
    if mode == "weightedmean" and mask is not None and not mask[:, :1].all():
        # sentence-transformers before 6.1 counts from column 0 there.
        return "pooling_mode='weightedmean' with padding on the left"
    return None


def _unfused_rest(modules: list[nn.Module]) -> str | None:
    written = {_VECTOR}
    for module in modules:
        if module.module_input_name not in written:
            return f"{type(module).__name__} reads {module.module_input_name}"
        written.add(module.module_output_name)
    return None


def transformers_model(model: nn.Sequential) -> nn.Module:
    """The transformers model in the first module. TypeError where it has none."""
    inner = getattr(model[0], "model", None)
    if type(model[0]) is not Transformer or not isinstance(inner, nn.Module):
        raise TypeError(
            f"model: its first module is {type(model[0]).__name__}; accepted is Transformer"
        )
    return inner
