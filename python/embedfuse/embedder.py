"""Embedder: load an embedding model and use it without padding, batch sizes or a second library."""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral

import numpy as np
import torch
from tqdm.auto import tqdm

from embedfuse.ops import Csr, lexical_scores, maxsim
from embedfuse.ops.checks import as_tensor
from embedfuse.patching import Report, patch, report, warm_up
from embedfuse.patching.families import patched_class_of
from embedfuse.patching.swap import Options
from embedfuse.pipeline.checkpoint import read_preset
from embedfuse.pipeline.embeddings import Embeddings, Vectors
from embedfuse.pipeline.heads import load_heads
from embedfuse.pipeline.llm2vec import WrappedTexts
from embedfuse.pipeline.loading import load_model, load_tokenizer
from embedfuse.pipeline.pipeline import EmbeddingPipeline
from embedfuse.pipeline.presets import Preset
from embedfuse.pipeline.scores import score_pairs
from embedfuse.pipeline.tokenize import TextTokenizer

_ARRAYS = {"float32": torch.float32, "float16": torch.float16}


class Embedder:
    """An embedding model with its tokenizer, patched: BGE-M3 with all three outputs, and dense models.

    model: folder or hub name of a checkpoint that `patch` takes. A PEFT adapter is merged into the
        model that it is for.
    dtype: "float32", "bfloat16" or "float16" of weights and arithmetic; sums are fp32 in all.
    device: default the GPU when there is one.
    max_length: tokens of a text, special ones included; default what the preset says.
    preset: how the model wants its texts and gives its vectors (`embedfuse.Preset`). The fields of a
        Preset that say something win over the files of sentence-transformers beside the weights, and
        these over the entry of `embedfuse.PRESETS`. That is found by the checkpoint's name, and in its
        stead may be named here. To change one field: `dataclasses.replace(PRESETS["e5"], ...)`.
    strict: where the tokenizer does not add the token that ends every text, though the checkpoint wants
        it: raise instead of having it added, with a warning.
    dimensions: keep so many leading entries of dense and multi-vector rows, of models trained so that these
        do alone (Matryoshka); they are normalised after that.
    reuse_prefixes: as in `patch`, and without effect on a model that looks both ways; an instruction before
        the queries of a decoder runs once, not per query.
    hub: further arguments of transformers' from_pretrained (revision, token, cache_dir ...). Remote code
        runs only with trust_remote_code=True among them.

    An encoder that no file and no entry knows pools the first token, normalised. Calls from several
    threads are safe.

    Raises ValueError for a dtype that the preset calls unsafe, more dimensions than there are, and a decoder
    of which nothing says how it is pooled; TypeError for a checkpoint that `patch` does not take.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        max_length: int | None = None,
        preset: str | Preset | None = None,
        strict: bool = False,
        dimensions: int | None = None,
        reuse_prefixes: str = "stream",
        **hub,
    ):
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}: accepted are float32, bfloat16 and float16")
        Options(reuse_prefixes=reuse_prefixes)  # for its error, before the weights are read
        if not isinstance(dimensions, Integral | None) or isinstance(dimensions, bool):
            raise TypeError(
                f"dimensions={dimensions!r}: accepted is a whole number, or None for all"
            )
        self.preset = read_preset(model, hub, preset)
        self.preset.check_dtype(dtype)
        tokenize = TextTokenizer(load_tokenizer(model, self.preset, strict, hub))
        torch_dtype = getattr(torch, dtype)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        transformer = load_model(model, torch_dtype, hub).requires_grad_(False).to(device)
        both_ways = self.preset.attention == "bidirectional"
        attention = "bidirectional" if both_ways else None
        keeps = not both_ways and "stream" in patched_class_of(transformer).reuses
        reuse = "batch" if reuse_prefixes == "stream" and not keeps else reuse_prefixes
        patch(transformer, attention=attention, reuse_prefixes=reuse)
        self._pipeline = EmbeddingPipeline(
            transformer,
            tokenize,
            load_heads(model, transformer.config.hidden_size, device, torch_dtype, **hub),
            pooling=self.preset.pooling,
            normalize=self.preset.normalize,
            dimensions=dimensions,
            wrapped=WrappedTexts(tokenize, self.preset) if self.preset.wraps else None,
        )
        width = transformer.config.hidden_size
        if dimensions is not None and not 1 <= dimensions <= width:
            raise ValueError(f"dimensions={dimensions}: accepted is 1 to {width}")
        longest = min(self.tokenizer.model_max_length, transformer.longest_sequence())
        default = min(longest, self.preset.max_length or longest)
        self.max_length = default if max_length is None else max_length
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

    def warm_up(
        self, tokens: int = 512, sequences: int = 8, outputs: Sequence[str] = ("dense",)
    ) -> int:
        """`embedfuse.warm_up` for `encode` with these outputs."""
        self._pipeline.check_outputs(outputs)
        pruned = tuple(outputs) == ("dense",) and self._pipeline.wrapped is None
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
        """Embeddings of texts, in their order.

        outputs: any of "dense" (texts, hidden), "sparse" (lexical weights) and "multi" (one vector per
            token but the first), all from one forward.
        prompt: put before every text; default the preset's, which is empty for most.
        array_dtype: "float32" or "float16" of the dense and multi-vector arrays.
        show_progress: a bar on stderr.

        Raises TypeError or ValueError, naming the place, for a text that is not a str or holds a lone
        surrogate, ValueError for outputs that this model does not have, and RuntimeError after somebody
        unpatched `model`.
        """
        dtype = _array_dtype(array_dtype)
        how = {"prompt": prompt, "array_dtype": array_dtype, "show_progress": show_progress}
        parts = list(self.iter_encode(texts, outputs, **how))
        return Embeddings.cat(parts) if parts else self._pipeline.empty(outputs, dtype).host()

    def encode_queries(
        self,
        texts: Iterable[str],
        instruction: str | None = None,
        outputs: Sequence[str] = ("dense",),
        **how,
    ) -> Embeddings:
        """Embeddings of queries: `encode` with the prompt that the model was trained to see there.

        instruction: one sentence that describes the task, as the model's family takes it; default the
            preset's query_prompt, which for these families asks for web search.
        how: array_dtype and show_progress, as in encode.

        Raises ValueError for an instruction to a model that takes none, and otherwise as encode.
        """
        prompt = self.preset.prompt_of_query(instruction)
        return self.encode(texts, outputs, prompt=prompt, **how)

    def encode_documents(
        self, texts: Iterable[str], outputs: Sequence[str] = ("dense",), **how
    ) -> Embeddings:
        """Embeddings of passages: `encode` with the prompt that the model was trained to see there."""
        return self.encode(texts, outputs, prompt=self.preset.prompt_of_document(), **how)

    def iter_encode(
        self,
        texts: Iterable[str],
        outputs: Sequence[str] = ("dense",),
        *,
        prompt: str | None = None,
        array_dtype: str = "float32",
        show_progress: bool = False,
    ) -> Iterator[Embeddings]:
        """As encode, a few hundred texts at a time; `texts` may be a generator over more than fits in
        memory."""
        dtype = _array_dtype(array_dtype)
        self._pipeline.check(texts, outputs)  # now, not when the first part is asked for
        prompt = self.preset.prompt if prompt is None else prompt

        def parts() -> Iterator[Embeddings]:
            total = len(texts) if hasattr(texts, "__len__") else None
            with tqdm(total=total, unit="text", disable=not show_progress) as bar:
                call = (texts, outputs, self.max_length, dtype, bar.update)
                yield from map(Vectors.host, self._pipeline.stream(*call, prompt=prompt))

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
        """(queries, passages): sum over shared tokens of the product of their weights.

        queries, passages: as encode gives them under "sparse". Raises TypeError for anything else.
        """
        for name, side in (("queries", queries), ("passages", passages)):
            if not isinstance(side, Csr):
                raise TypeError(
                    f'{name}: {type(side).__name__}; accepted is Csr, what encode gives under "sparse"'
                )
        return lexical_scores(queries, passages).numpy()

    @staticmethod
    def colbert_score(query: np.ndarray, passage: np.ndarray) -> float:
        """Mean over the query's rows of the largest dot product with a row of the passage.

        query, passage: (tokens, columns), as encode gives them under "multi".
        """
        query, passage = (as_tensor(x)[None].float() for x in (query, passage))
        return maxsim(query, passage, reduction="mean").item()


def _array_dtype(name: str) -> torch.dtype:
    if name not in _ARRAYS:
        raise ValueError(f"array_dtype={name!r}: accepted are {' and '.join(_ARRAYS)}")
    return _ARRAYS[name]
