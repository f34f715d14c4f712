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
from embedfuse.patching.tree import first_parameter
from embedfuse.pipeline.batches import TokenBudget, delayed, prefetch_map
from embedfuse.pipeline.embeddings import OUTPUTS, BatchVectors, Vectors
from embedfuse.pipeline.heads import Heads
from embedfuse.pipeline.llm2vec import LLM2VecTokenizer, last_tokens
from embedfuse.pipeline.tokenize import TextTokenizer, check_texts
from embedfuse.transfers import ToHost

T = TypeVar("T")
# One window is tokenised while the one before it is computed; its size limits the memory of a stream.
WINDOW_TEXTS = 256
WINDOW_CHARACTERS = 2**18
_NO_WEIGHTS = Csr(
    torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
)


class NoTokenError(ValueError):
    """A text for which the tokenizer gives no token."""


class EmbeddingPipeline:
    """A patched model with its tokenizer and heads. Thread-safe.

    Args:
        model: a patched model without a task head.
        tokenize: its tokenizer.
        heads: its sparse and multi-vector heads.
        pooling: of the dense vector, as in ops.pool_normalize.
        normalize: whether dense and multi-vector rows get length 1.
        dimensions: how many leading entries of these to keep; None keeps all.
        llm2vec: replaces `tokenize` for models whose texts are read as LLM2Vec does.
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
        llm2vec: LLM2VecTokenizer | None = None,
    ):
        self.model, self.heads = model, heads
        self.tokenize, self.llm2vec = tokenize, llm2vec
        self.pooling, self.normalize, self.dimensions = pooling, normalize, dimensions
        self.budget = TokenBudget(model.device)

    @property
    def device(self) -> torch.device:
        """As model.device, where texts go."""
        parameter = first_parameter(self.model)
        return self.model.device if parameter is None else parameter.device

    def stream(
        self,
        texts: Iterable[str],
        outputs: Sequence[str],
        max_length: int,
        dtype: torch.dtype = torch.float32,
        advance: Callable[[int], object] = lambda texts: None,
        max_batch_tokens: int | None = None,
        prompt: str = "",
        on_host: bool = True,
    ) -> Iterator[Vectors]:
        """Embeddings of the texts, one window after another, in order.

        Args:
            texts: may be a generator; it is read one window in advance.
            outputs: of OUTPUTS.
            max_length: tokens of a text, special ones included.
            dtype: of dense and multi-vector rows.
            advance: called with the number of texts that have been finished since the last call.
            max_batch_tokens: limits the tokens of one forward further than the budget does.
            prompt: put before every text.
            on_host: whether to copy the results to the host, while the next batch is computed.
        """
        self.check(texts, outputs)
        to_host = ToHost(self.device)

        def tokenize(window: tuple[int, list[str]]) -> tuple[list[list[int]], list[int] | None]:
            return self._tokenize(*window, prompt, max_length)

        def finish(vectors: BatchVectors) -> Callable[[], Vectors]:
            return vectors.send(to_host) if on_host else vectors.vectors

        def batches() -> Iterator[tuple[int, list[int], Callable[[], Vectors]]]:
            """(texts of the window, indices in it, function that waits for their vectors)."""
            longest = max_length * 16  # characters that count; of a longer text hardly more is read
            cut = windows(texts, lambda text: length_of(text, longest))
            for ids, pooled in prefetch_map(tokenize, cut):
                for batch, wait in self.run(ids, outputs, finish, dtype, max_batch_tokens, pooled):
                    yield len(ids), batch, wait

        parts, done = [], 0
        for window_texts, batch, wait in delayed(batches(), to_host.in_flight):
            parts.append((batch, wait()))
            advance(len(batch))
            done += len(batch)
            if done == window_texts:
                yield Vectors.collect(parts)
                parts, done = [], 0

    def _tokenize(
        self, start: int, texts: list[str], prompt: str, max_length: int
    ) -> tuple[list[list[int]], list[int] | None]:
        """Token ids of the texts from number `start` on, and how many of each are pooled; None for all."""
        check_texts(texts, start=start)
        if self.llm2vec is None:
            ids, pooled = self.tokenize([prompt + text for text in texts], max_length), None
        else:
            ids, pooled = self.llm2vec(texts, prompt, max_length)
        if [] in ids:
            raise NoTokenError(
                f"texts[{start + ids.index([])}]: the tokenizer makes no token of it; accepted is "
                "text of one token or more"
            )
        return ids, pooled

    def run(
        self,
        sequences: list[list[int]],
        outputs: Sequence[str],
        finish: Callable[[BatchVectors], T],
        dtype: torch.dtype = torch.float32,
        max_batch_tokens: int | None = None,
        pooled: list[int] | None = None,
    ) -> Iterator[tuple[list[int], T]]:
        """(indices, finish(their vectors)) for batches of token id lists.

        pooled: how many tokens at the end of each list the dense vector pools; None for all.
        """

        def run_batch(batch: list[int]) -> T:
            counts = None if pooled is None else [pooled[i] for i in batch]
            return finish(self._forward([sequences[i] for i in batch], outputs, dtype, counts))

        return self.budget.run([len(s) for s in sequences], run_batch, max_batch_tokens)

    @torch.inference_mode()
    def _forward(
        self, sequences: list[list[int]], outputs, dtype: torch.dtype, counts: list[int] | None
    ) -> BatchVectors:
        device = self.device
        input_ids, packed = end_to_end(sequences, device)
        only_dense = tuple(outputs) == ("dense",) and counts is None
        found = self.model.sequence_states(input_ids, packed, self.pooling if only_dense else None)
        states = found.states
        dense = kept = multi = None
        if "dense" in outputs:
            pooled = found if counts is None else PackedStates(*last_tokens(states, packed, counts))
            dense = pooled.pool(self.pooling, self.normalize, self.dimensions, dtype)
        if "sparse" in outputs:
            kept = self._lexical(states, input_ids, packed)
        if "multi" in outputs:
            head = self.heads.multi
            rows = head(states) if is_hooked(head) else linear(head, states, inference=True)
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
        """Special tokens, which have no lexical weight in FlagEmbedding."""
        tokenizer = self.tokenize.tokenizer
        names = ("cls", "eos", "pad", "unk")
        ids = {getattr(tokenizer, f"{name}_token_id") for name in names}
        return tuple(sorted(ids - {None}))

    def check(self, texts: Iterable[str], outputs: Sequence[str]) -> None:
        """TypeError or ValueError for arguments that are wrong whatever the texts are."""
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
        """The result for zero texts."""
        columns = len(range(self.model.config.hidden_size)[: self.dimensions])
        dense = torch.zeros(0, columns, dtype=dtype, device=self.model.device)
        return Vectors(
            dense if "dense" in outputs else None,
            _NO_WEIGHTS if "sparse" in outputs else None,
            [] if "multi" in outputs else None,
        )


def windows(items: Iterable[T], length: Callable[[T], int]) -> Iterator[tuple[int, list[T]]]:
    """(index of the first item, items) of consecutive windows.

    A window ends after WINDOW_TEXTS items, or with the item that reaches WINDOW_CHARACTERS characters.
    """
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
    """Characters of a text, at most `longest`. Anything but a str counts 0; check_texts reports it."""
    return min(len(text), longest) if isinstance(text, str) else 0
