"""A stream of texts as batches of about equally many tokens, and their results back in order."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

# Tokens of one forward. On a CPU the tower takes them in smaller steps (nn/encoder.py); on a GPU this
# many fill it.
_BUDGETS = {"cpu": 8192, "cuda": 32768}
T = TypeVar("T")
R = TypeVar("R")
logger = logging.getLogger("embedfuse")


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function(item) of each item in order, computed on another thread one item ahead.

    The items are read on the caller's thread. A single item is computed there too: starting a thread
    would cost more than a short text. What `items` or `function` raises comes after all results before it.
    """
    items = iter(items)
    first = list(itertools.islice(items, 1))
    if not first:
        return
    result = function(first[0])
    with ThreadPoolExecutor(1, "embedfuse-tokenize") as pool:
        while True:
            try:
                item = next(items)
            except StopIteration:
                yield result
                return
            except BaseException:
                yield result
                raise
            coming = pool.submit(function, item)
            yield result
            result = coming.result()


def behind(items: Iterable[T], count: int) -> Iterator[T]:
    """The items in order, each handed out when `count` more have come, or none is left to come.

    What `items` raises comes after all before it.
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

    A sequence that is longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[i] > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= lengths[i]
    return batches


class TokenBudget:
    """Runs sequences in batches of so many tokens; halves the budget when memory runs out.

    tokens: None: what suits the device.
    """

    def __init__(self, device: torch.device, tokens: int | None = None):
        self.tokens = tokens or _BUDGETS.get(device.type, _BUDGETS["cpu"])

    def lower(self, tokens: int) -> None:
        """To at most so many tokens; it never rises again."""
        self.tokens = max(1, min(self.tokens, tokens))

    def run(
        self, lengths: Sequence[int], function: Callable[[list[int]], R], at_most: int | None = None
    ) -> Iterator[tuple[list[int], R]]:
        """(indices, function(indices)) for batches of indices that cover all of `lengths`.

        at_most: tokens of a batch in this run alone; None: as the budget says.
        A batch that does not fit into memory runs again in halves. A single sequence that does not
        fit raises, like every other error.
        """
        todo = deque(token_batches(lengths, min(self.tokens, at_most or self.tokens)))
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
            # Outside the except block, so that the traceback holds none of the failed batch's memory.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            rest = [batch, *todo]
            todo = deque(
                [part[i] for i in split]
                for part in rest
                for split in token_batches([lengths[i] for i in part], self.tokens)
            )


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own error class; on the CPU torch's allocator raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error) and "allocate memory" in str(error)
