"""FlagEmbedding's BGEM3FlagModel on embedfuse's pipeline: same calls, keys, types and values.

One type differs: the lexical score of two texts without a shared token is 0.0; the original gives the
integer 0.

What changes: the first batch runs once and not twice, batches are formed by tokens, there is no padding,
lexical weights need no loop over tokens, scores are computed for the given pairs only, and no array is a
view of a batch.
"""

from collections import defaultdict

import numpy as np
import torch
from FlagEmbedding.inference.embedder.encoder_only import m3
from torch import nn
from tqdm import tqdm

from embedfuse.integrations.flag_embedding.wrapper import (
    LEFT_PADDING,
    FlagWrapper,
    most_tokens,
    stream,
)
from embedfuse.integrations.probe import PROBE_TEXTS
from embedfuse.ops import Csr, lexical_scores, maxsim
from embedfuse.patching.check import deviations, evaluating
from embedfuse.patching.families import patched_class_of
from embedfuse.patching.forward.encoder import PackedEncoder
from embedfuse.patching.layout import replaced
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options
from embedfuse.pipeline.embeddings import Embeddings
from embedfuse.pipeline.heads import Heads
from embedfuse.pipeline.pipeline import EmbeddingPipeline
from embedfuse.pipeline.progress import progress
from embedfuse.pipeline.scores import score_pairs

_ORIGINAL = m3.M3Embedder
_POOLINGS = {"cls": "cls", "mean": "mean", "last_token": "last"}
# Methods of the model inside that are replaced by the pipeline; an edited one runs the original.
_EMBED = ("forward", "_dense_embedding", "_sparse_embedding", "_colbert_embedding")
_SCORE = (
    *("compute_dense_score", "compute_sparse_score", "compute_colbert_score"),
    "_compute_similarity",
)
_EVERYTHING = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}


# The original is the first base, so that both classes have one memory layout: assigning __class__ needs it.
class M3Embedder(_ORIGINAL, FlagWrapper):
    original = _ORIGINAL

    @classmethod
    def inner_model(cls, model: _ORIGINAL) -> nn.Module:
        inner = model.model.model
        if not issubclass(patched_class_of(inner), PackedEncoder):
            raise TypeError(
                f"model: the model inside is a {type(inner).__name__}; accepted is XLMRobertaModel"
            )
        return inner

    @classmethod
    def wrap(cls, model: _ORIGINAL, report: Report, options: Options) -> None:
        call = _EVERYTHING | {"device": model.target_devices[0]}
        with evaluating(model.model):
            expected = _ORIGINAL.encode_single_device(model, PROBE_TEXTS, **call)
            cls.swap_in(model, report, options)
            found = model.encode_single_device(PROBE_TEXTS, **call)
        report.fused.append("dense, sparse and multi-vector outputs from one packed pass")
        report.deviations |= deviations(model.model, *_comparable(expected, found))

    @torch.no_grad()
    def encode_single_device(
        self,
        sentences: list[str] | str,
        batch_size: int = 256,
        max_length: int = 512,
        return_dense: bool = True,
        return_sparse: bool = False,
        return_colbert_vecs: bool = False,
        device: str | None = None,
        **kwargs,
    ):
        kwargs.pop("convert_to_numpy", None)
        wanted = {"dense": return_dense, "sparse": return_sparse, "multi": return_colbert_vecs}
        outputs = tuple(name for name, on in wanted.items() if on)
        if why := self._refusal(kwargs) or (None if outputs else "no output is asked for"):
            self._embedfuse.report.original(why)
            return super().encode_single_device(
                sentences, batch_size, max_length, *wanted.values(), device, **kwargs
            )
        device = self.target_devices[0] if device is None else device
        self._prepare(device, torch.float32 if device == "cpu" else None)
        texts = [sentences] if isinstance(sentences, str) else sentences
        pipeline = self._pipeline(self.truncate_dim)
        parts = [v.numpy() for v in stream(pipeline, texts, outputs, batch_size, max_length)]
        found = Embeddings.cat(parts) if parts else pipeline.empty(outputs, torch.float32).numpy()
        half = self.model.model.dtype == torch.float16
        results = {
            "dense_vecs": found.dense.astype(np.float16) if half and return_dense else found.dense,
            "lexical_weights": _dicts(found.sparse, half) if return_sparse else None,
            "colbert_vecs": found.multi,
        }
        if isinstance(sentences, str):
            return {name: None if value is None else value[0] for name, value in results.items()}
        return results

    @torch.no_grad()
    def compute_score_single_device(
        self,
        sentence_pairs: list[tuple[str, str]] | tuple[str, str],
        batch_size: int = 256,
        max_query_length: int = 512,
        max_passage_length: int = 512,
        weights_for_different_modes: list[float] | None = None,
        device: str | None = None,
        **kwargs,
    ):
        if why := self._refusal(kwargs) or self._scores_refusal():
            self._embedfuse.report.original(why)
            return super().compute_score_single_device(
                sentence_pairs,
                batch_size,
                max_query_length,
                max_passage_length,
                weights_for_different_modes,
                device,
                **kwargs,
            )
        device = self.target_devices[0] if device is None else device
        self._prepare(device, torch.float32 if device == "cpu" else None)
        if len(sentence_pairs) == 0:
            return []
        weights = weights_for_different_modes
        weights = [1.0, 1.0, 1.0] if weights is None else weights
        if len(weights) != 3:
            raise ValueError(f"weights_for_different_modes: {len(weights)} of them; accepted are 3")
        one_pair = isinstance(sentence_pairs[0], str)
        pairs = [sentence_pairs] if one_pair else sentence_pairs
        pipeline = self._pipeline(None)  # the original truncates no vector here
        lengths = max_query_length, max_passage_length
        shown = len(pairs) >= batch_size
        with progress(tqdm, shown, len(pairs), desc="Compute Scores") as advance:
            limit = most_tokens(batch_size, max(lengths))
            scores = score_pairs(pipeline, pairs, weights, *lengths, advance, limit)
        return {name: column[0] for name, column in scores.items()} if one_pair else scores

    def compute_lexical_matching_score(self, lexical_weights_1, lexical_weights_2):
        sides = (lexical_weights_1, lexical_weights_2)
        weights = {
            type(w) for side in sides if isinstance(side, list) for d in side for w in d.values()
        }
        lists = all(isinstance(side, list) and side for side in sides)
        if not lists or weights != {np.float32}:
            return super().compute_lexical_matching_score(*sides)
        number: dict[str, int] = {}
        scores = lexical_scores(*(_csr(side, number) for side in sides)).numpy()
        # Where two texts share no token the original has the integer 0, which widens its array.
        return scores if scores.all() else scores.astype(np.float64)

    def colbert_score(self, q_reps: np.ndarray, p_reps: np.ndarray) -> torch.Tensor:
        if 0 in (len(q_reps), len(p_reps)):
            return super().colbert_score(q_reps, p_reps)
        q, p = torch.from_numpy(q_reps), torch.from_numpy(p_reps)
        return maxsim(q[None], p[None], reduction="mean")[0, 0].to(q.dtype)

    def _refusal(self, kwargs: dict) -> str | None:
        if why := super()._refusal(kwargs):
            return why
        inner = self.model
        if name := replaced(inner, "FlagEmbedding", *_EMBED):
            return f"{name} was replaced"
        if inner.sentence_pooling_method not in _POOLINGS:
            return f"sentence_pooling_method={inner.sentence_pooling_method!r}"
        return None if self.tokenizer.padding_side == "right" else LEFT_PADDING

    def _scores_refusal(self) -> str | None:
        """Why the original computes scores of pairs; None where it does not."""
        inner = self.model
        if name := replaced(inner, "FlagEmbedding", *_SCORE):
            return f"{name} was replaced"
        if inner.temperature != 1:
            return f"temperature={inner.temperature}"
        return None

    def _pipeline(self, dimensions: int | None) -> EmbeddingPipeline:
        inner = self.model
        return self._embedding_pipeline(
            inner.model,
            Heads(inner.sparse_linear, inner.colbert_linear),
            pooling=_POOLINGS[inner.sentence_pooling_method],
            normalize=inner.normalize_embeddings,
            dimensions=dimensions,
        )


def _dicts(sparse: Csr, half: bool) -> list[dict]:
    """As the original returns them: defaultdicts of numpy scalars."""
    weights = sparse.weights[sparse.places()].numpy()
    weights = iter(weights.astype(np.float16) if half else weights)
    return [defaultdict(int, zip(row, weights, strict=False)) for row in sparse.dicts()]


def _csr(rows: list[dict[str, np.float32]], number: dict[str, int]) -> Csr:
    """Dicts as Csr. number: the id of each key; new keys are added."""
    indptr, ids, weights = [0], [], []
    for row in rows:
        entries = sorted((number.setdefault(key, len(number)), w) for key, w in row.items() if w)
        ids += [i for i, _ in entries]
        weights += [w for _, w in entries]
        indptr.append(len(ids))
    return Csr(
        torch.tensor(indptr), torch.tensor(ids), torch.tensor(np.array(weights, dtype=np.float32))
    )


def _comparable(*results: dict) -> list[dict[str, torch.Tensor]]:
    """The outputs of two encodes as tensors, for the self-check."""
    # A weight near zero may be an entry in one result and missing in the other.
    keys = sorted({key for result in results for row in result["lexical_weights"] for key in row})
    keys = keys or [""]  # no entries: compare a column of zeros
    return [
        {
            "dense_vecs": torch.from_numpy(result["dense_vecs"]),
            "lexical_weights": torch.tensor(
                [[float(row.get(key, 0)) for key in keys] for row in result["lexical_weights"]]
            ),
            "colbert_vecs": torch.from_numpy(np.concatenate(result["colbert_vecs"])),
        }
        for result in results
    ]
