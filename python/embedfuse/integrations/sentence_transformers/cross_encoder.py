"""CrossEncoder: the transformers model inside is patched; the methods of CrossEncoder stay as they are."""

import sentence_transformers
from torch import nn

from embedfuse.integrations.sentence_transformers.inference import QuickInference
from embedfuse.integrations.sentence_transformers.model import transformers_model
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options

_ORIGINAL = sentence_transformers.CrossEncoder


class CrossEncoder(QuickInference, _ORIGINAL):
    original = _ORIGINAL

    @classmethod
    def inner_model(cls, model: _ORIGINAL) -> nn.Module:
        return transformers_model(model)

    @classmethod
    def wrap(cls, model: _ORIGINAL, report: Report, options: Options) -> None:
        cls.swap_in(model, report, options)
