"""Batches of about equally many tokens, and iterators that overlap tokenising, computing and copying."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

# Tokens per forward. On a CPU the tower splits them into smaller steps (nn/tower.py); a GPU is full with this
# many.
_BUDGETS = {"cpu": 8192, "cuda": 32768}
T = TypeVar("T")
R = TypeVar("R")
logger = logging.getLogger("embedfuse")


def prefetch_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function(item) of each item in order, computed on another thread one item in advance.

    The items are read on the caller's thread. A single item is computed there too, because a thread and its
    queue cost more than tokenising a short text. Errors of `items` and `function` are raised after all
    earlier results.
    """
    items = iter(items)
    first = list(itertools.islice(items, 1))
    if not first:
        return
    result, pool = function(first[0]), None
    try:
        while True:
            try:
                item = next(items)
            except StopIteration:
                yield result
                return
            except BaseException:
                yield result
                raise
            pool = pool or ThreadPoolExecutor(1, "embedfuse-tokenize")
            future = pool.submit(function, item)
            yield result
            result = future.result()
    finally:
        if pool is not None:
            pool.shutdown()


def delayed(items: Iterable[T], count: int) -> Iterator[T]:
    """The items in order, each yielded only after `count` more were read, or the last one.

    An error of `items` is raised after all earlier items.
    """
    waiting: deque[T] = deque()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > count:
                yield waiting.popleft()
    except Exception:
        yield from waiting
        raise
    yield from waiting


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the sequences, longest first, in batches of at most `budget` tokens.

    A sequence longer than the budget is the only one in its batch.
    """
    batches: list[list[int]] = []
    remaining = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[i] > remaining:
            batches.append([])
            remaining = budget
        batches[-1].append(i)
        remaining -= lengths[i]
    return batches


class TokenBudget:
    """Runs sequences in batches of at most `tokens` tokens, and halves that when memory runs out.

    tokens: None chooses by the device.
    """

    def __init__(self, device: torch.device, tokens: int | None = None):
        self.tokens = tokens or _BUDGETS.get(device.type, _BUDGETS["cpu"])

    def lower(self, tokens: int) -> None:
        """Lower the budget to at most `tokens`. It never rises again."""
        self.tokens = max(1, min(self.tokens, tokens))

    def run(
        self,
        lengths: Sequence[int],
        function: Callable[[list[int]], R],
        max_batch_tokens: int | None = None,
    ) -> Iterator[tuple[list[int], R]]:
        """(indices, function(indices)) for batches of indices that cover all of `lengths`.

        A batch that does not fit into memory is run again in halves. A single sequence that does not
        fit raises, as every other error does.

        max_batch_tokens: limits the batches of this run further than `tokens` does.
        """
        todo = deque(token_batches(lengths, min(self.tokens, max_batch_tokens or self.tokens)))
        while todo:
            batch = todo.popleft()
            try:
                result = function(batch)
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                tokens = sum(lengths[i] for i in batch)
                self.lower(min(self.tokens, tokens) // 2)
                logger.warning(
                    "out of memory at %d tokens: going on with batches of %d", tokens, self.tokens
                )
            else:
                yield batch, result
                continue
            # Outside of the except block, where the traceback would keep the failed batch's tensors alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            rest = [batch, *todo]
            todo = deque(
                [part[i] for i in split]
                for part in rest
                for split in token_batches([lengths[i] for i in part], self.tokens)
            )


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU torch has an error class for it; on the CPU only the message tells."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error) and "allocate memory" in str(error)
