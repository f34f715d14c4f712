"""Token prefixes shared by several sequences, computed once by a causal tower.

With causal attention a token's state depends only on the tokens up to it, so sequences with the same
prefix have the same states, keys and values there. The sequences are sorted; each computes only the
tokens that it does not share with the one before it, and reads the other keys and values where they were
computed. This shares prefixes of any depth (as in a radix tree walked from left to right), not only one
instruction.
"""

import math
from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedfuse.packing import Packed, cu_seqlens_of, never_padded
from embedfuse.transfers import to_device

# Prefixes are shared only if that saves at least one token in so many. A saved token saves its part of the
# GEMMs; a shared one costs no more than a copy of its keys and values.
SAVED_ONE_IN = 16
# Shortest prefix that is kept from call to call.
MIN_KEPT_TOKENS = 16
Ids = np.ndarray  # (tokens,) token ids of one sequence


@dataclass
class Prefix:
    """Keys and values of a token prefix in every layer, each (tokens, kv_heads, head_dim).

    written: on a GPU, the stream that writes them and the event that it records after the last.
    """

    ids: Ids
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    written: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @property
    def nbytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in self.layers)

    def release(self) -> None:
        """Allow other streams to read once the current one has written."""
        if self.layers and self.layers[0][0].is_cuda:
            stream = torch.cuda.current_stream(self.layers[0][0].device)
            self.written = stream, stream.record_event()

    def acquire(self) -> None:
        """Make the current stream wait for the writes, and keep the memory until it has read."""
        if self.written is None:
            return
        writer, event = self.written
        reader = torch.cuda.current_stream(self.layers[0][0].device)
        if reader == writer:
            return
        reader.wait_event(event)
        with torch.inference_mode():  # outside of it torch may refuse to mark these tensors
            for tensor in chain.from_iterable(self.layers):
                tensor.record_stream(reader)


class PrefixCache:
    """Prefixes that occurred in two steps or more. The least recently used are dropped first.

    The cached values belong to the weights that `stamp` identifies; another stamp empties the cache.
    Thread-safe.
    """

    def __init__(self, max_bytes: int = 256 * 2**20):
        self.max_bytes = max_bytes
        self.stamp = None
        self._max_tokens = math.inf  # of a prefix; known once one was computed
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        self._recent: deque[Ids] = deque(maxlen=8)  # one sequence of each of the last steps
        self._lock = Lock()

    def prefixes(self, stamp) -> list[Prefix]:
        """All prefixes computed with the weights of `stamp`."""
        with self._lock:
            if stamp != self.stamp:
                self._empty(stamp)
            return list(self._prefixes.values())

    def forget(self) -> None:
        """Empty the cache, because the weights may have changed without changing the stamp."""
        with self._lock:
            self._empty(None)

    def _empty(self, stamp) -> None:
        self._prefixes.clear()
        self._recent.clear()
        self.stamp, self._max_tokens = stamp, math.inf

    def recurring(self, sequences: list[Ids]) -> tuple[int, int] | None:
        """The longest prefix that occurred in an earlier step too and is not cached yet.

        (index of one of these sorted sequences that begins with it, its tokens), or None.
        """
        with self._lock:
            recent, cached = list(self._recent), list(self._prefixes.values())
            max_tokens = self._max_tokens
        lists = [ids.tolist() for ids in sequences]
        best, tokens = None, MIN_KEPT_TOKENS - 1
        for ids in recent:
            insertion = bisect(lists, ids.tolist())
            for i in (insertion - 1, insertion):
                if 0 <= i < len(lists):
                    n = min(common_tokens(ids, sequences[i]), len(lists[i]) - 1, max_tokens)
                    if n > max(tokens, longest_prefix(cached, sequences[i], 0)[1]):
                        best, tokens = i, n
        return None if best is None else (best, tokens)

    def remember(self, stamp, sequence: Ids, used: list[Prefix], new: Prefix | None) -> None:
        """Record a step: one of its sequences, the prefixes that it used, and one to keep."""
        with self._lock:
            if stamp != self.stamp:
                return
            self._recent.append(sequence.copy())  # a view would keep the caller's batch alive
            for prefix in used:
                if prefix.ids.tobytes() in self._prefixes:
                    self._prefixes.move_to_end(prefix.ids.tobytes())
            if new is not None:
                self._max_tokens = self.max_bytes * len(new.ids) // new.nbytes
                if len(new.ids) <= self._max_tokens:  # else the next step keeps that much of it
                    self._prefixes[new.ids.tobytes()] = new
            while sum(p.nbytes for p in self._prefixes.values()) > self.max_bytes:
                self._prefixes.popitem(last=False)


@dataclass
class Step:
    """Sequences that are computed at once, and where the keys and values of each are.

    Attributes:
        sequences: (sequences,) their indices in the batch.
        places: (keys,) the index of each of their tokens in the batch.
        tokens: (computed,) those of `places` that this step computes.
        queries: how many tokens of each sequence it computes, the last ones.
        keys: all tokens of each sequence.
        source: (keys,) the row of each token in the rows of all `reused` prefixes followed by the
            computed ones.
        reused: prefixes whose keys and values were computed before.
        kept: prefix whose keys and values are to be kept, if any.
        span: where `kept` is among the keys.
    """

    sequences: Tensor
    places: Tensor
    tokens: Tensor
    queries: Packed
    keys: Packed
    source: Tensor
    reused: list[Prefix]
    kept: Prefix | None = None
    span: slice | None = None

    @property
    def last(self) -> Tensor:
        """(sequences,) which computed row is the last token of each sequence."""
        rows = self.source[self.keys.cu_seqlens[1:].long() - 1]
        return rows - sum(len(prefix.ids) for prefix in self.reused)

    def gather(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's computed keys and values (computed, kv_heads, head_dim) -> those of all tokens."""
        if self.reused:
            keys, values = zip(*(prefix.layers[layer] for prefix in self.reused), strict=True)
            key, value = torch.cat([*keys, key]), torch.cat([*values, value])
        key, value = key[self.source], value[self.source]
        if self.kept is not None:
            self.kept.layers.append((key[self.span].clone(), value[self.span].clone()))
        return key, value


def shared_steps(
    ids: Tensor, packed: Packed, step_tokens: int, cache: PrefixCache | None, stamp: Any = None
) -> Iterator[Step] | None:
    """The steps that compute a batch with its shared prefixes; None if that would save too little.

    Each step must be computed before the next is taken from the iterator.

    Args:
        ids: (tokens,) token ids; copied from the device if `packed` has none on the host.
        packed: the sequences of ids.
        step_tokens: computed tokens of a step, about.
        cache: prefixes of earlier calls, read and filled. None if the states of all tokens are needed,
            which it does not hold.
        stamp: identifies the weights, for the cache.
    """
    ids = ids.cpu() if packed.ids is None else packed.ids
    sequences = np.split(ids.numpy(), np.cumsum(packed.lengths)[:-1])
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].tolist())
    ordered = [sequences[i] for i in order]
    shared = [0, *(common_tokens(a, b) for a, b in pairwise(ordered))]
    if cache is None:
        saved, recurring = sum(shared), None
    else:
        cached = cache.prefixes(stamp)
        saved = sum(longest_prefix(cached, s, n)[1] for s, n in zip(ordered, shared, strict=True))
        recurring = cache.recurring(ordered)
    if saved * SAVED_ONE_IN <= packed.tokens and recurring is None:
        if cache is not None:
            cache.remember(stamp, ordered[0], [], None)
        return None
    return _steps(order, ordered, shared, packed, step_tokens, cache, stamp)


def _steps(order, ordered, shared, packed, step_tokens, cache, stamp) -> Iterator[Step]:
    starts = np.cumsum([0, *packed.lengths])
    first = 0
    while first < len(order):
        cached = [] if cache is None else cache.prefixes(stamp)
        reused: list[Prefix] = []
        sources, places, computed = [], [], []
        n_computed = 0
        for i in range(first, len(order)):
            ids, n_shared = ordered[i], shared[i] if sources else 0
            prefix, n = longest_prefix(cached, ids, n_shared)
            if sources and n_computed + len(ids) - n > step_tokens:
                break
            if prefix is None:
                head = sources[-1][:n] if sources else np.zeros(0, np.int64)
            else:
                head = ~(_first_row(reused, prefix) + np.arange(n))  # negative: a reused row
            sources.append(np.concatenate([head, n_computed + np.arange(len(ids) - n)]))
            places.append(starts[order[i]] + np.arange(len(ids)))
            computed.append(len(ids) - n)
            n_computed += len(ids) - n
        last = first + len(sources)
        step = _step(order[first:last], sources, places, computed, reused, packed.cu_seqlens.device)
        sequences = ordered[first:last]
        if cache is not None and (recurring := cache.recurring(sequences)):
            i, n = recurring
            begin = sum(map(len, sources[:i]))
            step.kept, step.span = Prefix(sequences[i][:n].copy()), slice(begin, begin + n)
        for prefix in reused:
            prefix.acquire()
        yield step
        if step.kept is not None:
            step.kept.release()
        if cache is not None:
            most_shared = max(range(first, last), key=lambda i: shared[i])
            cache.remember(stamp, ordered[most_shared], reused, step.kept)
        first = last


def _step(sequences, sources, places, computed, reused, device) -> Step:
    reused_rows = sum(len(prefix.ids) for prefix in reused)
    tokens = [place[len(place) - n :] for place, n in zip(places, computed, strict=True)]
    source = np.concatenate(sources)
    source = np.where(source < 0, ~source, source + reused_rows)
    arrays = np.array(sequences), np.concatenate(places), np.concatenate(tokens), source
    lengths = [len(s) for s in sources]
    sequences, places, tokens, source, cu_queries, cu_keys = to_device(
        device, *map(torch.from_numpy, arrays), cu_seqlens_of(computed), cu_seqlens_of(lengths)
    )
    queries, keys = never_padded(computed, cu_queries), never_padded(lengths, cu_keys)
    return Step(sequences, places, tokens, queries, keys, source, reused)


def _first_row(reused: list[Prefix], prefix: Prefix) -> int:
    """The prefix's first row among the rows of `reused`; it is appended if it is not there."""
    rows = 0
    for other in reused:
        if other is prefix:
            return rows
        rows += len(other.ids)
    reused.append(prefix)
    return rows


def longest_prefix(prefixes: list[Prefix], ids: Ids, more_than: int) -> tuple[Prefix | None, int]:
    """The prefix that shares the most tokens with `ids`, and how many; (None, more_than) if no more.

    The last token does not count: it has to be computed, because its state is needed.
    """
    best, tokens = None, more_than
    for prefix in prefixes:
        if tokens < min(len(ids) - 1, len(prefix.ids)) and prefix.ids[tokens] == ids[tokens]:
            n = min(common_tokens(prefix.ids, ids), len(ids) - 1)
            if n > tokens:
                best, tokens = prefix, n
    return best, tokens


def common_tokens(a: Ids, b: Ids) -> int:
    """The number of tokens at the start of a and b that are equal."""
    n = min(len(a), len(b))
    if n == 0 or a[0] != b[0]:
        return 0
    equal = a[:n] == b[:n]
    return n if equal.all() else int(equal.argmin())
