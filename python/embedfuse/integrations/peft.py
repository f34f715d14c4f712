"""PEFT: the transformers model inside is patched; its adapters run as modules."""

import peft
from torch import nn

from embedfuse.patching.families import patched_class_of
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options
from embedfuse.patching.wrapper import PatchedWrapper


class _PatchedPeft(PatchedWrapper):
    @classmethod
    def inner_model(cls, model: peft.PeftModel) -> nn.Module:
        return model.get_base_model()

    @classmethod
    def wrap(cls, model: peft.PeftModel, report: Report, options: Options) -> None:
        cls.swap_in(model, report, options)

    @classmethod
    def tower(cls, model: peft.PeftModel) -> nn.Module:
        if model.active_peft_config.is_prompt_learning:
            raise TypeError(
                "model: a PEFT model that learns prompts; accepted are adapters in its layers"
            )
        inner = model.get_base_model()
        return patched_class_of(inner).tower(inner)


class PeftModel(_PatchedPeft, peft.PeftModel):
    original = peft.PeftModel


class PeftModelForFeatureExtraction(_PatchedPeft, peft.PeftModelForFeatureExtraction):
    original = peft.PeftModelForFeatureExtraction
