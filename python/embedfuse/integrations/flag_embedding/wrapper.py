"""What patched objects of FlagEmbedding share: they hold a `model` and a `tokenizer`."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.layout import is_hooked
from embedfuse.patching.wrapper import PatchedWrapper
from embedfuse.pipeline.embeddings import Vectors
from embedfuse.pipeline.pipeline import EmbeddingPipeline
from embedfuse.pipeline.tokenize import TextTokenizer

T = TypeVar("T")
# Why the original serves where the first column is read, which holds no token then.
LEFT_PADDING = "the tokenizer pads on the left"
PROBE_TEXTS = ["One", "Two short words", "A somewhat longer text, so that padding is dropped."]


class FlagHolder(PatchedWrapper):
    def _unserved(self, kwargs: dict) -> str | None:
        """Why the original has to serve a call with such further arguments."""
        if kwargs:
            return f"called with {', '.join(kwargs)}"
        if not isinstance(self.inner_model_or_none(), PackedModel):
            return "the model inside is not patched"
        return "the model has a hook" if is_hooked(self.model) else None

    def _place(self, device: str, dtype: torch.dtype | None) -> None:
        """What the originals do to their model before every call, where it is not done yet.

        dtype: of the parameters; None: as they are.
        """
        # Heads too, which someone may have cast or moved on their own.
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in tensors):
            self.model.to(dtype)
        wanted = torch.empty(0, device=device).device  # "cuda" has no index, a tensor's device has
        if any(t.device != wanted for t in tensors):
            self.model.to(device)
        self.model.eval()

    def _kept(self, key: Hashable, made_of: tuple, make: Callable[[], T]) -> T:
        """make(), kept under `key` until one of `made_of` is another object."""
        cache = self._embedfuse.cache
        found = cache.get(key)
        if found is None or any(a is not b for a, b in zip(found[0], made_of, strict=True)):
            found = cache[key] = (made_of, make())
        return found[1]

    def _text_tokenizer(self) -> TextTokenizer:
        return self._kept("tokenize", (self.tokenizer,), lambda: TextTokenizer(self.tokenizer))


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
    label = {"desc": "Inference Embeddings", "disable": len(texts) < batch_size}
    with tqdm(total=len(texts), **label) as bar:
        call = (texts, outputs, max_length, dtype, bar.update, limit)
        yield from pipeline.stream(*call, on_host=on_host)


def most_tokens(batch_size: int, max_length: int) -> int:
    """Tokens of one forward: whoever sets a smaller batch size lacks memory."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: accepted is 1 or more")
    return batch_size * max_length
