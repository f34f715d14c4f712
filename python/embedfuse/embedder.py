"""Embedder: load an embedding model and encode texts, without padding and without batch sizes."""

import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from embedfuse.ops import Csr, lexical_scores, maxsim
from embedfuse.ops.checks import as_tensor
from embedfuse.patching import Report, patch, report, warm_up
from embedfuse.patching.families import patched_class_of
from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.swap import Options
from embedfuse.pipeline.checkpoint import read_preset
from embedfuse.pipeline.embeddings import Embeddings, Vectors
from embedfuse.pipeline.heads import load_heads
from embedfuse.pipeline.llm2vec import LLM2VecTokenizer
from embedfuse.pipeline.loading import load_model, load_tokenizer
from embedfuse.pipeline.pipeline import EmbeddingPipeline
from embedfuse.pipeline.presets import Preset
from embedfuse.pipeline.progress import progress
from embedfuse.pipeline.scores import score_pairs
from embedfuse.pipeline.tokenize import TextTokenizer

_DTYPES = ("float32", "bfloat16", "float16")
_ARRAY_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Embedder:
    """An embedding model with its tokenizer, patched: BGE-M3 with all three outputs, and dense models.

    An encoder for which no file and no preset says anything pools the first token, normalised.
    Calls from several threads are safe.

    Args:
        model: folder or hub name of a checkpoint that `patch` accepts. A PEFT adapter is merged into its
            base model.
        dtype: "float32", "bfloat16" or "float16", of weights and arithmetic. Sums are fp32 in all three.
        device: default: the GPU if there is one.
        max_length: tokens of a text, special ones included; default: the preset's.
        preset: how the model expects its texts and computes its vectors: a `Preset`, or a name in
            `embedfuse.PRESETS`. Each setting comes from the first of these that has it: the fields of a
            given Preset, the sentence-transformers files next to the weights, the entry of PRESETS with
            the given name, or else with the checkpoint's name. To change one field use
            `dataclasses.replace(PRESETS["e5"], ...)`.
        strict: raise an error if the tokenizer does not add the end token that the checkpoint expects.
            Default: add it, with a warning.
        dimensions: keep this many leading entries of dense and multi-vector rows, for models trained for
            it (Matryoshka). The rows are normalised afterwards.
        reuse_prefixes: as in `patch`; without effect on a bidirectional model. With "stream" the
            instruction before the queries of a decoder is computed once, not once per query.
        hub: further arguments of transformers' from_pretrained (revision, token, cache_dir, ...). Remote
            code runs only if trust_remote_code=True is one of them.

    Raises:
        ValueError: A dtype that the preset calls unsafe, more dimensions than the model has, or a decoder
            whose pooling nothing says.
        TypeError: A checkpoint that `patch` does not accept.

    Example:
        ```python
        embedder = embedfuse.Embedder("BAAI/bge-m3")
        found = embedder.encode(["a text"], outputs=("dense", "sparse"))
        found.dense.shape  # (1, 1024)
        ```
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        max_length: int | None = None,
        preset: str | Preset | None = None,
        strict: bool = False,
        dimensions: int | None = None,
        reuse_prefixes: str = "stream",
        **hub: Any,
    ):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r}: accepted are float32, bfloat16 and float16")
        Options(reuse_prefixes=reuse_prefixes)  # for its error, before the weights are read
        if not isinstance(dimensions, Integral | None) or isinstance(dimensions, bool):
            raise TypeError(
                f"dimensions={dimensions!r}: accepted is a whole number, or None for all"
            )
        model = os.fspath(model)
        self.preset = read_preset(model, hub, preset)
        self.preset.check_dtype(dtype)
        tokenize = TextTokenizer(load_tokenizer(model, self.preset, strict, hub))
        torch_dtype = getattr(torch, dtype)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = load_model(model, torch_dtype, hub).requires_grad_(False).to(device)
        transformer = self._patch(loaded, reuse_prefixes)
        pooling, normalize = self.preset.pooling, self.preset.normalize
        assert pooling is not None  # read_preset fills both
        assert normalize is not None
        hidden_size = transformer.config.hidden_size
        self._pipeline = EmbeddingPipeline(
            transformer,
            tokenize,
            load_heads(model, hidden_size, device, torch_dtype, **hub),
            pooling=pooling,
            normalize=normalize,
            dimensions=dimensions,
            llm2vec=LLM2VecTokenizer(tokenize, self.preset) if self.preset.wraps else None,
        )
        if dimensions is not None and not 1 <= dimensions <= hidden_size:
            raise ValueError(f"dimensions={dimensions}: accepted is 1 to {hidden_size}")
        longest = min(self.tokenizer.model_max_length, transformer.longest_sequence())
        default = min(longest, self.preset.max_length or longest)
        self.max_length = default if max_length is None else max_length
        if not 3 <= self.max_length <= longest:
            raise ValueError(f"max_length={max_length}: accepted is 3 to {longest}")

    def _patch(self, transformer: nn.Module, reuse_prefixes: str) -> PackedModel:
        bidirectional = self.preset.attention == "bidirectional"
        can_stream = not bidirectional and "stream" in patched_class_of(transformer).reuses
        if reuse_prefixes == "stream" and not can_stream:
            reuse_prefixes = "batch"
        attention = "bidirectional" if bidirectional else None
        patch(transformer, attention=attention, reuse_prefixes=reuse_prefixes)
        assert isinstance(transformer, PackedModel)  # its class now
        return transformer

    @property
    def model(self) -> Any:
        """The patched transformers model."""
        return self._pipeline.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._pipeline.tokenize.tokenizer

    @property
    def report(self) -> Report:
        """What was fused, what was not and why, and which calls ran the original forward."""
        return report(self.model)

    def warm_up(
        self, tokens: int = 512, sequences: int = 8, outputs: Sequence[str] = ("dense",)
    ) -> int:
        """Capture the CUDA graphs of small batches now, as `embedfuse.warm_up` does.

        Args:
            tokens: of the largest batch to expect, at most 1,024.
            sequences: texts of the largest batch to expect, at most 64.
            outputs: the outputs that `encode` will be called with.

        Returns:
            How many graphs the model has then; 0 if it can have none, and `report` says why.
        """
        self._pipeline.check_outputs(outputs)
        pruned = tuple(outputs) == ("dense",) and self._pipeline.llm2vec is None
        pooling = self.preset.pooling if pruned else None
        return warm_up(self.model, tokens=tokens, sequences=sequences, pooling=pooling)

    def encode(
        self,
        texts: Iterable[str],
        outputs: Sequence[str] = ("dense",),
        *,
        prompt: str | None = None,
        array_dtype: str = "float32",
        show_progress: bool = False,
    ) -> Embeddings:
        """Embed texts. All outputs come from one forward.

        Args:
            texts: the texts.
            outputs: any of "dense" (texts, hidden), "sparse" (lexical weights) and "multi" (one vector
                per token except the first).
            prompt: put before every text; default: the preset's, which is empty for most models.
            array_dtype: "float32" or "float16", of the dense and multi-vector arrays.
            show_progress: show a progress bar on stderr.

        Returns:
            The embeddings, in the order of the texts.

        Raises:
            TypeError: A text is not a str; the error names its index.
            ValueError: A text contains a lone surrogate (the error names its index), or the model does
                not have one of the outputs.
            RuntimeError: `model` was unpatched.
        """
        dtype = _array_dtype(array_dtype)
        options = {"prompt": prompt, "array_dtype": array_dtype, "show_progress": show_progress}
        parts = list(self.iter_encode(texts, outputs, **options))
        return Embeddings.cat(parts) if parts else self._pipeline.empty(outputs, dtype).numpy()

    def encode_queries(
        self,
        texts: Iterable[str],
        instruction: str | None = None,
        outputs: Sequence[str] = ("dense",),
        **options: Any,
    ) -> Embeddings:
        """Embed queries: `encode` with the prompt that the model was trained with for queries.

        Args:
            texts: the queries.
            instruction: one sentence that describes the task, for models that take one. Default: the
                preset's query_prompt, which for these models asks for web search.
            outputs: as in `encode`.
            options: array_dtype and show_progress, as in `encode`.

        Returns:
            The embeddings, in the order of the texts.

        Raises:
            ValueError: An instruction for a model that takes none; otherwise as `encode`.
        """
        prompt = self.preset.prompt_of_query(instruction)
        return self.encode(texts, outputs, prompt=prompt, **options)

    def encode_documents(
        self, texts: Iterable[str], outputs: Sequence[str] = ("dense",), **options: Any
    ) -> Embeddings:
        """Embed passages: `encode` with the prompt that the model was trained with for passages.

        Args:
            texts: the passages.
            outputs: as in `encode`.
            options: array_dtype and show_progress, as in `encode`.

        Returns:
            The embeddings, in the order of the texts.

        Raises:
            TypeError: As `encode`.
            ValueError: As `encode`.
        """
        return self.encode(texts, outputs, prompt=self.preset.prompt_of_document(), **options)

    def iter_encode(
        self,
        texts: Iterable[str],
        outputs: Sequence[str] = ("dense",),
        *,
        prompt: str | None = None,
        array_dtype: str = "float32",
        show_progress: bool = False,
    ) -> Iterator[Embeddings]:
        """Embed texts a few hundred at a time.

        Args:
            texts: the texts; may be a generator over more than fits in memory.
            outputs: as in `encode`.
            prompt: as in `encode`.
            array_dtype: as in `encode`.
            show_progress: as in `encode`.

        Returns:
            An iterator over the embeddings of consecutive parts of the texts.

        Raises:
            TypeError: As `encode`. Errors of a text are raised by the iterator, after all earlier parts.
            ValueError: As `encode`.
        """
        dtype = _array_dtype(array_dtype)
        # Not in parts(), which would check when the first part is taken.
        self._pipeline.check(texts, outputs)
        prompt = self.preset.prompt if prompt is None else prompt

        def parts() -> Iterator[Embeddings]:
            total = len(texts) if isinstance(texts, Sized) else None
            with progress(tqdm, show_progress, total, unit="text") as advance:
                call = (texts, outputs, self.max_length, dtype, advance)
                yield from map(Vectors.numpy, self._pipeline.stream(*call, prompt=prompt or ""))

        return parts()

    def compute_score(
        self,
        pairs: Sequence[tuple[str, str]],
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        *,
        show_progress: bool = False,
    ) -> dict[str, list[float]]:
        """Score (query, passage) pairs by all three embeddings.

        The keys and values are those of FlagEmbedding.

        Args:
            pairs: (query, passage) texts.
            weights: of the dense, sparse and multi-vector score in the combined ones.
            show_progress: show a progress bar on stderr.

        Returns:
            One list of scores per key: "dense" (q . p), "sparse" (sum over shared tokens of the product
                of their weights), "colbert" (mean over the query's tokens of the largest dot product with
                a passage token), "sparse+dense" and "colbert+sparse+dense" (means weighted by `weights`;
                nan if the weights sum to 0).

        Raises:
            TypeError: An element of `pairs` is not a pair of texts.
            ValueError: As `encode`, or not three weights.
        """
        if len(weights) != 3:
            raise ValueError(
                f"weights: {len(weights)} of them; accepted are 3 (dense, sparse, multi)"
            )
        for i, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"pairs[{i}]: {pair!r:.60}; accepted is (query, passage)")
        length = self.max_length
        with progress(tqdm, show_progress, len(pairs), unit="pair") as advance:
            return score_pairs(self._pipeline, pairs, weights, length, length, advance)

    @staticmethod
    def lexical_matching_score(queries: Csr, passages: Csr) -> np.ndarray:
        """Score sparse embeddings: sum over shared tokens of the product of their weights.

        Args:
            queries: lexical weights as `encode` returns them in `sparse`.
            passages: as queries.

        Returns:
            (queries, passages), float32.

        Raises:
            TypeError: An argument is not a Csr.
        """
        for name, side in (("queries", queries), ("passages", passages)):
            if not isinstance(side, Csr):
                raise TypeError(
                    f'{name}: {type(side).__name__}; accepted is Csr, what encode gives under "sparse"'
                )
        return lexical_scores(queries, passages).numpy()

    @staticmethod
    def colbert_score(query: np.ndarray, passage: np.ndarray) -> float:
        """Score multi-vectors: mean over the query's rows of the largest dot product with a passage row.

        Args:
            query: (tokens, columns), one array as `encode` returns them in `multi`.
            passage: as query.

        Returns:
            The score.
        """
        q, p = (as_tensor(x)[None].float() for x in (query, passage))
        return maxsim(q, p, reduction="mean").item()


def _array_dtype(name: str) -> torch.dtype:
    if name not in _ARRAY_DTYPES:
        raise ValueError(f"array_dtype={name!r}: accepted are {' and '.join(_ARRAY_DTYPES)}")
    return _ARRAY_DTYPES[name]
