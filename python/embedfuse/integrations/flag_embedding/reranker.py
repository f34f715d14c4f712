"""FlagEmbedding's FlagReranker: packed pairs, batches formed by tokens, one forward for each."""

import torch
from FlagEmbedding.inference.reranker.encoder_only import base
from torch import nn
from tqdm import tqdm

from embedfuse.integrations.flag_embedding.wrapper import LEFT_PADDING, FlagWrapper, most_tokens
from embedfuse.packing import end_to_end
from embedfuse.patching.check import deviations, evaluating
from embedfuse.patching.families import patched_class_of
from embedfuse.patching.forward.classifier import PackedClassifier
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options
from embedfuse.pipeline.batches import TokenBudget, delayed
from embedfuse.pipeline.progress import progress
from embedfuse.pipeline.tokenize import check_texts
from embedfuse.transfers import ToHost

_ORIGINAL = base.BaseReranker
_PROBE_PAIRS = [["one", "Two short words"], ["a longer question than that", "One"]]


# The original is the first base, so that both classes have one memory layout: assigning __class__ needs it.
class BaseReranker(_ORIGINAL, FlagWrapper):
    original = _ORIGINAL

    @classmethod
    def inner_model(cls, model: _ORIGINAL) -> nn.Module:
        inner = model.model
        if not issubclass(patched_class_of(inner), PackedClassifier):
            kind = type(inner).__name__
            raise TypeError(
                f"model: the model inside is a {kind}; accepted are …ForSequenceClassification"
            )
        if inner.config.num_labels != 1:
            raise TypeError(f"model: {inner.config.num_labels} labels; accepted is 1, the score")
        return inner

    @classmethod
    def wrap(cls, model: _ORIGINAL, report: Report, options: Options) -> None:
        call = {"device": model.target_devices[0], "normalize": False}
        with evaluating(model.model):
            expected = _ORIGINAL.compute_score_single_gpu(model, _PROBE_PAIRS, **call)
            cls.swap_in(model, report, options)
            found = model.compute_score_single_gpu(_PROBE_PAIRS, **call)
        scores = {"scores": torch.tensor(expected)}, {"scores": torch.tensor(found)}
        report.fused.append("packed query-passage pairs, batched by tokens")
        report.deviations |= deviations(model.model, *scores)

    @torch.no_grad()
    def compute_score_single_gpu(
        self,
        sentence_pairs: list[tuple[str, str]] | tuple[str, str],
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        device: str | None = None,
        **kwargs,
    ) -> list[float]:
        if why := self._refusal(kwargs):
            self._embedfuse.report.original(why)
            limits = (batch_size, query_max_length, max_length, normalize, device)
            return super().compute_score_single_gpu(sentence_pairs, *limits, **kwargs)
        batch_size = self.batch_size if batch_size is None else batch_size
        max_length = self.max_length if max_length is None else max_length
        if query_max_length is None:
            query_max_length = self.query_max_length
        if query_max_length is None:
            query_max_length = max_length * 3 // 4
        device = self.target_devices[0] if device is None else device
        if device == "cpu":
            self.use_fp16 = False
        self._prepare(device, torch.float16 if self.use_fp16 else None)
        if not sentence_pairs:
            return []
        pairs = [sentence_pairs] if isinstance(sentence_pairs[0], str) else sentence_pairs
        sequences = self._pair_ids(pairs, query_max_length, max_length)
        device = self.model.device
        budget = self._cached(("budget", str(device)), (), lambda: TokenBudget(device))
        scores, to_host = torch.empty(len(pairs)), ToHost(device)
        shown = len(pairs) >= batch_size
        with progress(tqdm, shown, len(pairs), desc="Compute Scores") as advance:
            run = budget.run(
                [len(s) for s in sequences],
                lambda batch: to_host(self._logits(sequences, batch)),
                max_batch_tokens=most_tokens(batch_size, max_length),
            )
            for batch, wait in delayed(run, to_host.in_flight):
                (logits,) = wait()
                scores[batch] = logits.view(-1).float()
                advance(len(batch))
        if self.normalize if normalize is None else normalize:
            return [base.sigmoid(score) for score in scores.tolist()]
        return scores.tolist()

    def _refusal(self, kwargs: dict) -> str | None:
        left = self.tokenizer.padding_side != "right"
        return super()._refusal(kwargs) or (LEFT_PADDING if left else None)

    def _logits(self, sequences: list[list[int]], batch: list[int]) -> torch.Tensor:
        chosen = [sequences[i] for i in batch]
        return self.model.sequence_logits(*end_to_end(chosen, self.model.device))

    def _pair_ids(self, pairs, query_max_length: int, max_length: int) -> list[list[int]]:
        """Token ids of pairs, as the original makes them: each side truncated and decoded, then joined."""
        tokenize = self._text_tokenizer()
        sides = []
        for side, name, length in ((0, "queries", query_max_length), (1, "passages", max_length)):
            texts = [pair[side] for pair in pairs]
            check_texts(texts, name)
            distinct = list(dict.fromkeys(texts))
            ids = tokenize(distinct, length, special=False)
            verbatim = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            decoded = dict(zip(distinct, self.tokenizer.batch_decode(ids, **verbatim), strict=True))
            sides.append([decoded[text] for text in texts])
        return tokenize.pairs(*sides, max_length)
