"""Token prefixes that sequences share, run through a causal tower once.

Where attention is causal, a token's states depend on the tokens before it alone: sequences that begin
alike have the same states, keys and values there. Sorted, each sequence runs only the tokens that it
does not share with the one before it, and reads the other keys and values where they were computed.
That folds prefixes of any depth (a radix tree, walked from left to right), not only one instruction.
"""

import math
from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from embedfuse.packing import Packed, cu_seqlens_of, never_padded
from embedfuse.transfers import to_device

# Folding has to save one token in so many. A token saved is worth its share of the GEMMs, and a token
# folded costs no more than a copy of its keys and values.
SAVES = 16
# A prefix is kept from call to call from so many tokens on.
KEPT_TOKENS = 16
Ids = np.ndarray  # (tokens,) of one sequence


@dataclass
class Prefix:
    """Keys and values of a token prefix in every layer.

    written: on a GPU, the stream that writes them and its event behind the last of them.
    """

    ids: Ids
    layers: list[tuple[Tensor, Tensor]] = field(
        default_factory=list
    )  # (tokens, kv_heads, head_dim)
    written: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @property
    def nbytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in self.layers)

    def release(self) -> None:
        """Let other streams read, once the current one has written."""
        if self.layers and self.layers[0][0].is_cuda:
            stream = torch.cuda.current_stream(self.layers[0][0].device)
            self.written = stream, stream.record_event()

    def acquire(self) -> None:
        """Have the current stream wait for the one that writes, and the memory for the current one."""
        if self.written is None:
            return
        writer, event = self.written
        reader = torch.cuda.current_stream(self.layers[0][0].device)
        if reader == writer:
            return
        reader.wait_event(event)
        with torch.inference_mode():  # outside of which torch may refuse to mark such tensors
            for tensor in chain.from_iterable(self.layers):
                tensor.record_stream(reader)


class PrefixCache:
    """Prefixes that came up in two steps or more; the ones least lately used go first.

    What it holds was computed with the weights of `stamp`; another stamp empties it. Calls from
    several threads are safe.
    """

    def __init__(self, max_bytes: int = 256 * 2**20):
        self.max_bytes = max_bytes
        self.stamp = None
        self._room = math.inf  # tokens, known once a prefix has come
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        self._seen: deque[Ids] = deque(maxlen=8)  # one sequence of each of the last steps
        self._lock = Lock()

    def prefixes(self, stamp) -> list[Prefix]:
        """All that hold for the weights of `stamp`."""
        with self._lock:
            if stamp != self.stamp:
                self._empty(stamp)
            return list(self._prefixes.values())

    def forget(self) -> None:
        """Hold nothing, because the weights may change in a way that the stamp does not show."""
        with self._lock:
            self._empty(None)

    def _empty(self, stamp) -> None:
        self._prefixes.clear()
        self._seen.clear()
        self.stamp, self._room = stamp, math.inf

    def recurring(self, sequences: list[Ids]) -> tuple[int, int] | None:
        """(which of these sorted sequences, tokens) of the longest prefix that a step before had too and
        that is not held yet."""
        with self._lock:
            seen, known, room = list(self._seen), list(self._prefixes.values()), self._room
        lists = [ids.tolist() for ids in sequences]
        best, tokens = None, KEPT_TOKENS - 1
        for ids in seen:
            place = bisect(lists, ids.tolist())
            for i in (place - 1, place):
                if 0 <= i < len(lists):
                    n = min(common(ids, sequences[i]), len(lists[i]) - 1, room)
                    if n > max(tokens, longest(known, sequences[i], 0)[1]):
                        best, tokens = i, n
        return None if best is None else (best, tokens)

    def remember(self, stamp, sequence: Ids, used: list[Prefix], new: Prefix | None) -> None:
        """What a step came across: one of its sequences, prefixes that it used and one to keep."""
        with self._lock:
            if stamp != self.stamp:
                return
            self._seen.append(sequence.copy())  # it is a part of the caller's batch
            for prefix in used:
                if prefix.ids.tobytes() in self._prefixes:
                    self._prefixes.move_to_end(prefix.ids.tobytes())
            if new is not None:
                self._room = self.max_bytes * len(new.ids) // new.nbytes
                if len(new.ids) <= self._room:  # otherwise the next step keeps so much of it
                    self._prefixes[new.ids.tobytes()] = new
            while sum(p.nbytes for p in self._prefixes.values()) > self.max_bytes:
                self._prefixes.popitem(last=False)


@dataclass
class Step:
    """Sequences that run at once, and where the keys and values of each lie.

    sequences: (sequences,) their numbers in the batch. places: (keys,) place of all their tokens in
    the batch. tokens: (computed,) the ones of these that run.
    queries: how many of these each sequence has, its last ones. keys: all tokens of each.
    source: (keys,) row of each among those of `reused`, one after the other, then the computed ones.
    kept, span: prefix whose keys and values to keep, and where it lies among the keys.
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
        """(sequences,) computed row of each sequence's last token."""
        rows = self.source[self.keys.cu_seqlens[1:].long() - 1]
        return rows - sum(len(prefix.ids) for prefix in self.reused)

    def unfold(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(computed, kv_heads, head_dim) of a layer -> those of all tokens of each sequence."""
        if self.reused:
            keys, values = zip(*(prefix.layers[layer] for prefix in self.reused), strict=True)
            key, value = torch.cat([*keys, key]), torch.cat([*values, value])
        key, value = key[self.source], value[self.source]
        if self.kept is not None:
            self.kept.layers.append((key[self.span].clone(), value[self.span].clone()))
        return key, value


def shared_steps(
    ids: Tensor, packed: Packed, step_tokens: int, cache: PrefixCache | None, stamp=None
) -> Iterator[Step] | None:
    """The steps of about step_tokens tokens that a batch takes; None where folding saves too little.

    ids: (tokens,), read from the device only where `packed` has none of the host. cache: prefixes of
    earlier calls, used and filled; None where the states of all tokens are wanted, which it does not
    hold. A step has to run before the next one is asked for.
    """
    ids = ids.cpu() if packed.ids is None else packed.ids
    sequences = np.split(ids.numpy(), np.cumsum(packed.lengths)[:-1])
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].tolist())
    ordered = [sequences[i] for i in order]
    shared = [0, *(common(a, b) for a, b in pairwise(ordered))]
    if cache is None:
        saved, recurring = sum(shared), None
    else:
        known = cache.prefixes(stamp)
        saved = sum(longest(known, s, n)[1] for s, n in zip(ordered, shared, strict=True))
        recurring = cache.recurring(ordered)
    if saved * SAVES <= packed.tokens and recurring is None:
        if cache is not None:
            cache.remember(stamp, ordered[0], [], None)
        return None
    return _steps(order, ordered, shared, packed, step_tokens, cache, stamp)


def _steps(order, ordered, shared, packed, step_tokens, cache, stamp) -> Iterator[Step]:
    begins = np.cumsum([0, *packed.lengths])
    first = 0
    while first < len(order):
        known = [] if cache is None else cache.prefixes(stamp)
        reused: list[Prefix] = []
        sources, places, own = [], [], []
        computed = 0
        for i in range(first, len(order)):
            ids, alike = ordered[i], shared[i] if sources else 0
            prefix, n = longest(known, ids, alike)
            if sources and computed + len(ids) - n > step_tokens:
                break
            if prefix is None:
                head = sources[-1][:n] if sources else np.zeros(0, np.int64)
            else:
                head = ~(_place(reused, prefix) + np.arange(n))  # negative: of a reused row
            sources.append(np.concatenate([head, computed + np.arange(len(ids) - n)]))
            places.append(begins[order[i]] + np.arange(len(ids)))
            own.append(len(ids) - n)
            computed += len(ids) - n
        last = first + len(sources)
        step = _step(order[first:last], sources, places, own, reused, packed.cu_seqlens.device)
        of_step = ordered[first:last]
        if cache is not None and (found := cache.recurring(of_step)):
            i, n = found
            begin = sum(map(len, sources[:i]))
            step.kept, step.span = Prefix(of_step[i][:n].copy()), slice(begin, begin + n)
        for prefix in reused:
            prefix.acquire()
        yield step
        if step.kept is not None:
            step.kept.release()
        if cache is not None:
            most_alike = max(range(first, last), key=lambda i: shared[i])
            cache.remember(stamp, ordered[most_alike], reused, step.kept)
        first = last


def _step(sequences, sources, places, own, reused, device) -> Step:
    rows = sum(len(prefix.ids) for prefix in reused)
    tokens = [place[len(place) - n :] for place, n in zip(places, own, strict=True)]
    source = np.concatenate(sources)
    source = np.where(source < 0, ~source, source + rows)
    arrays = np.array(sequences), np.concatenate(places), np.concatenate(tokens), source
    whole = [len(s) for s in sources]
    sequences, places, tokens, source, cu_queries, cu_keys = to_device(
        device, *map(torch.from_numpy, arrays), cu_seqlens_of(own), cu_seqlens_of(whole)
    )
    queries, keys = never_padded(own, cu_queries), never_padded(whole, cu_keys)
    return Step(sequences, places, tokens, queries, keys, source, reused)


def _place(reused: list[Prefix], prefix: Prefix) -> int:
    """Where the rows of the prefix start among those of `reused`, which gets it if it is new there."""
    rows = 0
    for other in reused:
        if other is prefix:
            return rows
        rows += len(other.ids)
    reused.append(prefix)
    return rows


def longest(known: list[Prefix], ids: Ids, beyond: int) -> tuple[Prefix | None, int]:
    """The prefix that begins like `ids` for more than `beyond` tokens, and for how many.

    None, and `beyond`, where there is none. The last token is left to run: its state is wanted.
    """
    best, tokens = None, beyond
    for prefix in known:
        if tokens < min(len(ids) - 1, len(prefix.ids)) and prefix.ids[tokens] == ids[tokens]:
            n = min(common(prefix.ids, ids), len(ids) - 1)
            if n > tokens:
                best, tokens = prefix, n
    return best, tokens


def common(a: Ids, b: Ids) -> int:
    """How many tokens a and b begin with alike."""
    n = min(len(a), len(b))
    if n == 0 or a[0] != b[0]:
        return 0
    alike = a[:n] == b[:n]
    return n if alike.all() else int(alike.argmin())
