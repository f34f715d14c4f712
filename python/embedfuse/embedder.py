"""Embedder: load an embedding model and use it without padding, batch sizes or a second library."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from tokenizers import normalizers
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from embedfuse.nn.heads import load_heads
from embedfuse.ops import Csr, lexical_scores, maxsim
from embedfuse.patching import Report, patch, report
from embedfuse.pipeline.checkpoint import read_settings
from embedfuse.pipeline.embeddings import Embeddings
from embedfuse.pipeline.pipeline import EmbeddingPipeline
from embedfuse.pipeline.scores import score_pairs
from embedfuse.pipeline.tokenize import TextTokenizer

_ARRAYS = {"float32": torch.float32, "float16": torch.float16}


class Embedder:
    """An embedding model with its tokenizer, patched: BGE-M3 with all three outputs, and dense encoders.

    model: folder or hub name of a checkpoint that `patch` takes.
    dtype: "float32", "bfloat16" or "float16" of weights and arithmetic; sums are fp32 in all.
    device: default the GPU when there is one.
    max_length: tokens of a text, special ones included; default what the checkpoint allows.
    hub: further arguments of transformers' from_pretrained (revision, token, cache_dir ...).

    Pooling and normalisation are those of the checkpoint's sentence-transformers files; without them
    the first token, normalised. Calls from several threads are safe.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        max_length: int | None = None,
        **hub,
    ):
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}: accepted are float32, bfloat16 and float16")
        torch_dtype = getattr(torch, dtype)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        transformer = AutoModel.from_pretrained(model, dtype=torch_dtype, **hub).eval().to(device)
        transformer.requires_grad_(False)
        patch(transformer)
        tokenizer = AutoTokenizer.from_pretrained(model, **hub)
        heads = load_heads(model, transformer.config.hidden_size, device, torch_dtype, **hub)
        settings = read_settings(model, hub)
        if settings.lower_case:
            backend = tokenizer.backend_tokenizer
            own = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        self._pipeline = EmbeddingPipeline(
            transformer,
            TextTokenizer(tokenizer),
            heads,
            pooling=settings.pooling,
            normalize=settings.normalize,
            prompt=settings.prompt,
        )
        limits = (settings.max_length, tokenizer.model_max_length, transformer.longest_sequence())
        longest = min(n for n in limits if n is not None)
        self.max_length = longest if max_length is None else max_length
        if not 3 <= self.max_length <= longest:
            raise ValueError(f"max_length={max_length}: accepted is 3 to {longest}")

    @property
    def model(self):
        """The patched transformers model."""
        return self._pipeline.model

    @property
    def tokenizer(self):
        return self._pipeline.tokenize.tokenizer

    @property
    def report(self) -> Report:
        """What was fused, what was refused, and which calls the original forward served."""
        return report(self.model)

    def encode(
        self,
        texts: Iterable[str],
        outputs: Sequence[str] = ("dense",),
        *,
        array_dtype: str = "float32",
        show_progress: bool = False,
    ) -> Embeddings:
        """Embeddings of texts, in their order.

        outputs: any of "dense" (texts, hidden), "sparse" (lexical weights) and "multi" (one vector per
            token but the first), all from one forward.
        array_dtype: "float32" or "float16" of the dense and multi-vector arrays.
        show_progress: a bar on stderr.

        Raises TypeError or ValueError, naming the place, for a text that is not a str or holds a lone
        surrogate, and ValueError for outputs that this model does not have.
        """
        dtype = _array_dtype(array_dtype)
        parts = list(
            self.iter_encode(texts, outputs, array_dtype=array_dtype, show_progress=show_progress)
        )
        return Embeddings.cat(parts) if parts else self._pipeline.empty(outputs, dtype)

    def iter_encode(
        self,
        texts: Iterable[str],
        outputs: Sequence[str] = ("dense",),
        *,
        array_dtype: str = "float32",
        show_progress: bool = False,
    ) -> Iterator[Embeddings]:
        """As encode, a few hundred texts at a time; `texts` may be a generator over more than fits in
        memory."""
        dtype = _array_dtype(array_dtype)
        self._pipeline.check(texts, outputs)  # now, not when the first part is asked for

        def parts() -> Iterator[Embeddings]:
            total = len(texts) if hasattr(texts, "__len__") else None
            with tqdm(total=total, unit="text", disable=not show_progress) as bar:
                yield from self._pipeline.stream(texts, outputs, self.max_length, dtype, bar.update)

        return parts()

    def compute_score(
        self,
        pairs: Sequence[tuple[str, str]],
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        *,
        show_progress: bool = False,
    ) -> dict[str, list[float]]:
        """Scores of (query, passage) pairs by all three embeddings.

        weights: of dense, sparse and multi-vector score in the combined ones.

        Returns one list per key: "dense" (q . p), "sparse" (sum of products of shared tokens' weights),
        "colbert" (mean over query tokens of the best dot product with a passage token), "sparse+dense"
        and "colbert+sparse+dense" (means with `weights`); keys and numbers of FlagEmbedding.
        A mean whose weights sum to 0 is nan.
        Raises TypeError for what is not a pair of texts, ValueError as encode does.
        """
        if len(weights) != 3:
            raise ValueError(
                f"weights: {len(weights)} of them; accepted are 3 (dense, sparse, multi)"
            )
        for i, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"pairs[{i}]: {pair!r:.60}; accepted is (query, passage)")
        length = self.max_length
        with tqdm(total=len(pairs), unit="pair", disable=not show_progress) as bar:
            return score_pairs(self._pipeline, pairs, weights, length, length, bar.update)

    @staticmethod
    def lexical_matching_score(queries: Csr, passages: Csr) -> np.ndarray:
        """(queries, passages): sum over shared tokens of the product of their weights."""
        return lexical_scores(queries, passages).numpy()

    @staticmethod
    def colbert_score(query: np.ndarray, passage: np.ndarray) -> float:
        """Mean over the query's rows of the largest dot product with a row of the passage.

        query, passage: (tokens, columns), as encode gives them under "multi".
        """
        query, passage = (torch.from_numpy(x)[None].float() for x in (query, passage))
        return maxsim(query, passage, reduction="mean").item()


def _array_dtype(name: str) -> torch.dtype:
    if name not in _ARRAYS:
        raise ValueError(f"array_dtype={name!r}: accepted are {' and '.join(_ARRAYS)}")
    return _ARRAYS[name]
