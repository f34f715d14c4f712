"""FlagEmbedding's FlagLLMModel on embedfuse's pipeline: same calls, types and values.

What changes: the first batch runs once and not twice, batches are formed by tokens, there is no padding,
and the last layer computes only the last token of each text.
"""

import numpy as np
import torch
from FlagEmbedding.inference.embedder.decoder_only import base
from torch import Tensor, nn

from embedfuse.integrations.end_token import EndsTexts
from embedfuse.integrations.flag_embedding.wrapper import FlagWrapper, stream
from embedfuse.integrations.probe import PROBE_TEXTS
from embedfuse.patching.check import deviations, evaluating
from embedfuse.patching.families import patched_class_of
from embedfuse.patching.forward.decoder import PackedDecoder
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options
from embedfuse.pipeline.embeddings import Vectors
from embedfuse.pipeline.heads import Heads
from embedfuse.pipeline.pipeline import NoTokenError

_ORIGINAL = base.BaseLLMEmbedder
_DENSE = ("dense",)


# The original is the first base, so that both classes have one memory layout: assigning __class__ needs it.
class BaseLLMEmbedder(_ORIGINAL, EndsTexts, FlagWrapper):
    original = _ORIGINAL

    @classmethod
    def inner_model(cls, model: _ORIGINAL) -> nn.Module:
        inner = model.model
        if not issubclass(patched_class_of(inner), PackedDecoder):
            kind = type(inner).__name__
            raise TypeError(
                f"model: the model inside is a {kind}; accepted are MistralModel, LlamaModel, Qwen2Model and "
                "Qwen3Model"
            )
        return inner

    @classmethod
    def wrap(cls, model: _ORIGINAL, report: Report, options: Options) -> None:
        call = {"device": model.target_devices[0], "convert_to_numpy": False}
        cls.swap_in(model, report, options)
        model.repair_end(last_token=True)
        with evaluating(model.model):
            expected = _ORIGINAL.encode_single_device(model, PROBE_TEXTS, **call)
            found = model.encode_single_device(PROBE_TEXTS, **call)
        report.fused.append("last-token embeddings from one packed pass, batched by tokens")
        report.deviations |= deviations(
            model.model, {"embeddings": expected}, {"embeddings": found}
        )

    @torch.no_grad()
    def encode_single_device(
        self,
        sentences: list[str] | str,
        batch_size: int = 256,
        max_length: int = 512,
        convert_to_numpy: bool = True,
        device: str | None = None,
        **kwargs,
    ) -> np.ndarray | Tensor:
        limits = (batch_size, max_length, convert_to_numpy, device)
        if why := self._refusal(kwargs):
            self._embedfuse.report.original(why)
            return super().encode_single_device(sentences, *limits, **kwargs)
        device = self.target_devices[0] if device is None else device
        self._prepare(device, torch.float32 if device == "cpu" else None)
        texts = [sentences] if isinstance(sentences, str) else sentences
        pipeline = self._embedding_pipeline(
            self.model,
            Heads(),
            pooling="last",
            normalize=self.normalize_embeddings,
            dimensions=self.truncate_dim,
        )
        dtype = self.model.dtype

        def finished(vectors: Vectors) -> np.ndarray | Tensor:
            dense = vectors.dense
            return self._convert_to_numpy(dense, device=device) if convert_to_numpy else dense

        call = (pipeline, texts, _DENSE, batch_size, max_length, dtype)
        run = stream(*call, on_host=convert_to_numpy)
        try:
            parts = [finished(vectors) for vectors in run]
        except NoTokenError:
            self._embedfuse.report.original("a text without tokens")
            return super().encode_single_device(sentences, *limits)
        parts = parts or [finished(pipeline.empty(_DENSE, dtype))]
        found = np.concatenate(parts) if convert_to_numpy else torch.cat(parts)
        return found[0] if isinstance(sentences, str) else found
