"""PEFT: the transformers model inside is patched; adapters run as the modules that they are."""

import peft
from torch import nn

from embedfuse.patching.engine import Options
from embedfuse.patching.holder import PatchedHolder
from embedfuse.patching.report import Report


class _PatchedPeft(PatchedHolder):
    @classmethod
    def held(cls, model: peft.PeftModel) -> nn.Module:
        return model.get_base_model()

    @classmethod
    def wrap(cls, model: peft.PeftModel, report: Report, options: Options) -> None:
        cls.swap_in(model, report, options)


class PeftModel(_PatchedPeft, peft.PeftModel):
    original = peft.PeftModel


class PeftModelForFeatureExtraction(_PatchedPeft, peft.PeftModelForFeatureExtraction):
    original = peft.PeftModelForFeatureExtraction
