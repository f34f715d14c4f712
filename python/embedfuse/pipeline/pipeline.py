"""EmbeddingPipeline: texts -> token ids -> batches by tokens -> packed forward -> embeddings."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from embedfuse.nn.linear import linear
from embedfuse.ops import Csr, pool_normalize
from embedfuse.ops.lexical.sparse_scatter import KeptTokens, kept_tokens
from embedfuse.ops.lexical.weights import token_weights
from embedfuse.packing import Packed, end_to_end
from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.forward.tokens import PackedStates
from embedfuse.patching.layout import is_hooked
from embedfuse.pipeline.batches import TokenBudget, ahead, behind
from embedfuse.pipeline.embeddings import OUTPUTS, BatchVectors, Vectors
from embedfuse.pipeline.heads import Heads
from embedfuse.pipeline.llm2vec import WrappedTexts, tails
from embedfuse.pipeline.tokenize import TextTokenizer, check_texts
from embedfuse.transfers import ToHost

T = TypeVar("T")
# One window is tokenised while the one before runs, and bounds the memory of a stream.
WINDOW_TEXTS = 256
WINDOW_CHARACTERS = 2**18
_NO_WEIGHTS = Csr(
    torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
)


class NoTokenError(ValueError):
    """A text of which the tokenizer makes no token."""


class EmbeddingPipeline:
    """A patched model with its tokenizer and heads. Calls from several threads are safe.

    model: a patched model without a head on top. pooling: of the dense vector, as in
    ops.pool_normalize. normalize: whether dense and multi-vector rows get length 1. dimensions: keep so
    many leading entries of these; None: all. wrapped: reads the texts, instead of `tokenize` with the
    prompt before them.
    """

    def __init__(
        self,
        model: PackedModel,
        tokenize: TextTokenizer,
        heads: Heads,
        *,
        pooling: str = "cls",
        normalize: bool = True,
        dimensions: int | None = None,
        wrapped: WrappedTexts | None = None,
    ):
        self.model, self.heads = model, heads
        self.tokenize = tokenize
        self.pooling, self.normalize, self.dimensions = pooling, normalize, dimensions
        self.wrapped = wrapped
        self.budget = TokenBudget(model.device)

    def stream(
        self,
        texts: Iterable[str],
        outputs: Sequence[str],
        max_length: int,
        dtype: torch.dtype = torch.float32,
        advance: Callable[[int], None] = lambda texts: None,
        at_most: int | None = None,
        prompt: str = "",
        on_host: bool = True,
    ) -> Iterator[Vectors]:
        """Vectors of one window of texts after the other, in order.

        From a GPU they travel while the next batch runs. on_host=False leaves them there.
        dtype: of dense and multi-vector rows. advance: told how many more texts are done.
        at_most: tokens of one forward, where the caller wants less than the budget. prompt: put before
        every text.
        """
        self.check(texts, outputs)

        def ids_of(window: tuple[int, list[str]]) -> tuple[list[list[int]], list[int] | None]:
            start, window_texts = window
            check_texts(window_texts, start=start)
            if self.wrapped is None:
                ids, own = self.tokenize([prompt + text for text in window_texts], max_length), None
            else:
                ids, own = self.wrapped(window_texts, prompt, max_length)
            if [] in ids:
                raise NoTokenError(
                    f"texts[{start + ids.index([])}]: the tokenizer makes no token of it; accepted is "
                    "text of one token or more"
                )
            return ids, own

        to_host = ToHost(self.model.device)

        def leave(found: BatchVectors) -> Callable[[], Vectors]:
            return found.send(to_host) if on_host else found.vectors

        def batches() -> Iterator[tuple[int, list[int], Callable[[], Vectors]]]:
            """Batches that have started, each with the number of texts of its window."""
            longest = max_length * 16  # of a longer text, hardly more is read
            cut = windows(texts, lambda text: length_of(text, longest))
            for sequences, own in ahead(ids_of, cut):
                for batch, arrive in self.run(sequences, outputs, leave, dtype, at_most, own):
                    yield len(sequences), batch, arrive

        parts, done = [], 0
        for wanted, batch, arrive in behind(batches(), to_host.behind):
            parts.append((batch, arrive()))
            advance(len(batch))
            done += len(batch)
            if done == wanted:
                yield Vectors.collect(parts)
                parts, done = [], 0

    def run(
        self,
        sequences: list[list[int]],
        outputs: Sequence[str],
        finish: Callable[[BatchVectors], T],
        dtype: torch.dtype = torch.float32,
        at_most: int | None = None,
        own: list[int] | None = None,
    ) -> Iterator[tuple[list[int], T]]:
        """(indices, what `finish` makes of their vectors) of batches of token id lists.

        own: of each list, how many tokens at its end the dense vector pools; None: all.
        """

        def of_batch(batch: list[int]) -> T:
            counts = None if own is None else [own[i] for i in batch]
            return finish(self._forward([sequences[i] for i in batch], outputs, dtype, counts))

        return self.budget.run([len(s) for s in sequences], of_batch, at_most)

    @torch.inference_mode()
    def _forward(
        self, sequences: list[list[int]], outputs, dtype: torch.dtype, own: list[int] | None
    ) -> BatchVectors:
        device = self.model.device
        input_ids, packed = end_to_end(sequences, device)
        only_dense = tuple(outputs) == ("dense",) and own is None
        found = self.model.sequence_states(input_ids, packed, self.pooling if only_dense else None)
        states = found.states
        dense = kept = multi = None
        if "dense" in outputs:
            pooled = found if own is None else PackedStates(*tails(states, packed, own))
            dense = pooled.pool(self.pooling, self.normalize, self.dimensions, dtype)
        if "sparse" in outputs:
            kept = self._lexical(states, input_ids, packed)
        if "multi" in outputs:
            head = self.heads.multi
            rows = head(states) if is_hooked(head) else linear(head, states, plain=True)
            rows = rows[:, : self.dimensions]
            each = torch.arange(len(rows) + 1, device=device, dtype=torch.int32)
            multi = pool_normalize(
                rows, cu_seqlens=each, pooling="cls", normalize=self.normalize, out_dtype=dtype
            )
        return BatchVectors(packed, dense, kept, multi)

    def _lexical(self, states: Tensor, input_ids: Tensor, packed: Packed) -> KeptTokens:
        head = self.heads.sparse
        if type(head) is nn.Linear and not is_hooked(head):
            weights = token_weights(states, head.weight[0], head.bias)
        else:
            weights = head(states).squeeze(-1).float()
        excluded = self._special_ids()
        return kept_tokens(weights, input_ids, cu_seqlens=packed.cu_seqlens, excluded=excluded)

    def _special_ids(self) -> tuple[int, ...]:
        """Tokens that have no lexical weight, as FlagEmbedding leaves them out."""
        tokenizer = self.tokenize.tokenizer
        names = ("cls", "eos", "pad", "unk")
        ids = {getattr(tokenizer, f"{name}_token_id") for name in names}
        return tuple(sorted(ids - {None}))

    def check(self, texts: Iterable[str], outputs: Sequence[str]) -> None:
        """TypeError or ValueError for arguments that need no look into the texts."""
        self.check_outputs(outputs)
        if isinstance(texts, str):
            raise TypeError("texts: a str; accepted is a list of str")

    def check_outputs(self, outputs: Sequence[str]) -> None:
        if not isinstance(self.model, PackedModel):
            raise RuntimeError(
                f"model: this {type(self.model).__name__} was unpatched; embedfuse.patch it again"
            )
        if not outputs or not set(outputs) <= set(OUTPUTS):
            raise ValueError(f"outputs={outputs!r}: accepted is a tuple of {', '.join(OUTPUTS)}")
        for name, head in (("sparse", self.heads.sparse), ("multi", self.heads.multi)):
            if name in outputs and head is None:
                file = {"sparse": "sparse_linear.pt", "multi": "colbert_linear.pt"}[name]
                raise ValueError(f"outputs: {name!r} needs {file}, which this model does not have")

    def empty(self, outputs: Sequence[str], dtype: torch.dtype) -> Vectors:
        """Vectors of no text at all."""
        columns = len(range(self.model.config.hidden_size)[: self.dimensions])
        dense = torch.zeros(0, columns, dtype=dtype, device=self.model.device)
        return Vectors(
            dense if "dense" in outputs else None,
            _NO_WEIGHTS if "sparse" in outputs else None,
            [] if "multi" in outputs else None,
        )


def windows(items: Iterable[T], length: Callable[[T], int]) -> Iterator[tuple[int, list[T]]]:
    """(place of the first, items) of windows of at most WINDOW_TEXTS items and, with the item that goes
    beyond, WINDOW_CHARACTERS characters."""
    start, characters = 0, 0
    window: list[T] = []
    for item in items:
        window.append(item)
        characters += length(item)
        if len(window) == WINDOW_TEXTS or characters >= WINDOW_CHARACTERS:
            yield start, window
            start, window, characters = start + len(window), [], 0
    if window:
        yield start, window


def length_of(text: str, longest: int) -> int:
    """Characters that count of a text; what is no str is found out later, by its place."""
    return min(len(text), longest) if isinstance(text, str) else 0
