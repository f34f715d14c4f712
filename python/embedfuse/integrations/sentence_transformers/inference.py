"""What `encode` and `predict` of sentence-transformers ask of all modules, answered without their walks."""

from typing import Any

import torch
from sentence_transformers.base.model import BaseModel

from embedfuse.patching.tree import first_parameter
from embedfuse.patching.wrapper import PatchedWrapper

# As they were written; the first is absent before 6.2.
_RESOLVE = getattr(BaseModel, "_resolve_inference_device", None)
_DEVICE = BaseModel.device


class QuickInference(PatchedWrapper):
    """Mixin of a patched BaseModel."""

    def _resolve_inference_device(self, device: int | str | torch.device | None) -> torch.device:
        """The original's answer, which it gives itself where it has to move the model or others placed it."""
        original = super()._resolve_inference_device
        written = original.__func__ is _RESOLVE and type(self).device is _DEVICE
        parameter = first_parameter(self)  # a replica of DataParallel has none
        if written and parameter is not None and not self._placement_is_delegated:
            found = parameter.device
            asked = device in (None, found, str(found))
            if asked and {tensor.device for tensor in self.tree_of(self).tensors} == {found}:
                return found
        return original(device)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        # Before 6.2 encode and predict call to(device), which walks through all modules.
        if _RESOLVE is None and not kwargs and len(args) == 1:
            there = {tensor.device for tensor in self.tree_of(self).tensors}
            if there == {args[0]} or {str(device) for device in there} == {args[0]}:
                return self
        return super().to(*args, **kwargs)

    def train(self, mode: bool = True):
        # encode calls eval(); to read the flags is faster than to set them.
        if self.training is mode and all(m.training is mode for m in self.tree_of(self).modules):
            return self
        return super().train(mode)
