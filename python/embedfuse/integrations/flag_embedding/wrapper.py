"""What patched objects of FlagEmbedding share: each wraps a `model` and a `tokenizer`."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.layout import is_hooked
from embedfuse.patching.wrapper import PatchedWrapper
from embedfuse.pipeline.embeddings import Vectors
from embedfuse.pipeline.heads import Heads
from embedfuse.pipeline.pipeline import EmbeddingPipeline
from embedfuse.pipeline.progress import progress
from embedfuse.pipeline.tokenize import TextTokenizer

T = TypeVar("T")
# Why the original runs where it pools the first column, which then holds padding.
LEFT_PADDING = "the tokenizer pads on the left"


class FlagWrapper(PatchedWrapper):
    model: Any
    tokenizer: Any

    def _refusal(self, kwargs: dict) -> str | None:
        """Why the original runs a call with these further arguments; None where it does not."""
        if kwargs:
            return f"called with {', '.join(kwargs)}"
        if not isinstance(self.inner_model_or_none(), PackedModel):
            return "the model inside is not patched"
        return "the model has a hook" if is_hooked(self.model) else None

    def _prepare(self, device: str, dtype: torch.dtype | None) -> None:
        """Cast and move the model and set eval mode, as the originals do before every call.

        dtype: of the parameters; None: as they are.
        """
        tree = self.tree_of(self.model)
        # The heads may have another dtype or device than the rest.
        dtypes, devices = zip(*{(t.dtype, t.device) for t in tree.tensors}, strict=True)
        if dtype is not None and any(d.is_floating_point and d != dtype for d in dtypes):
            self.model.to(dtype)
        wanted = torch.empty(0, device=device).device  # "cuda" has no index, a tensor's device has
        if any(d != wanted for d in devices):
            self.model.to(device)
        if any(module.training for module in (self.model, *tree.modules)):
            self.model.eval()

    def _cached(self, key: Hashable, sources: tuple, make: Callable[[], T]) -> T:
        """make(), cached under `key` until one of `sources` is another object."""
        cache = self._embedfuse.cache
        found = cache.get(key)
        if found is None or any(a is not b for a, b in zip(found[0], sources, strict=True)):
            found = cache[key] = (sources, make())
        return found[1]

    def _text_tokenizer(self) -> TextTokenizer:
        return self._cached("tokenize", (self.tokenizer,), lambda: TextTokenizer(self.tokenizer))

    def _embedding_pipeline(
        self,
        model: PackedModel,
        heads: Heads,
        *,
        pooling: str,
        normalize: bool,
        dimensions: int | None,
    ) -> EmbeddingPipeline:
        return self._cached(
            ("pipeline", dimensions, str(model.device)),
            (model, self.tokenizer, heads.sparse, heads.multi, pooling, normalize),
            lambda: EmbeddingPipeline(
                model,
                self._text_tokenizer(),
                heads,
                pooling=pooling,
                normalize=normalize,
                dimensions=dimensions,
            ),
        )


def stream(
    pipeline: EmbeddingPipeline,
    texts: Sequence[str],
    outputs: tuple[str, ...],
    batch_size: int,
    max_length: int,
    dtype: torch.dtype = torch.float32,
    on_host: bool = True,
) -> Iterator[Vectors]:
    """The pipeline's stream, with FlagEmbedding's limits and its progress bar."""
    limit = most_tokens(batch_size, max_length)
    shown = len(texts) >= batch_size
    with progress(tqdm, shown, len(texts), desc="Inference Embeddings") as advance:
        call = (texts, outputs, max_length, dtype, advance, limit)
        yield from pipeline.stream(*call, on_host=on_host)


def most_tokens(batch_size: int, max_length: int) -> int:
    """Upper bound for the tokens of one forward. A caller that lacks memory sets a smaller batch_size."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: accepted is 1 or more")
    return batch_size * max_length
