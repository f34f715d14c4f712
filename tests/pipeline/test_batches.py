"""Batches by tokens, memory that runs out, and work done one item in advance."""

import threading

import pytest
import torch

from embedfuse.pipeline.batches import TokenBudget, is_out_of_memory, prefetch_map, token_batches


def test_token_batches():
    assert token_batches([3, 9, 1, 5, 4], 9) == [[1], [3, 4], [0, 2]]
    assert token_batches([20, 3, 3], 6) == [[0], [1, 2]]  # longer than the budget: alone
    assert token_batches([2, 2, 2], 100) == [[0, 1, 2]]
    assert token_batches([], 5) == []


def run(budget: TokenBudget, lengths, function):
    return [(batch, result) for batch, result in budget.run(lengths, function)]


def out_of_memory_above(limit: int, lengths, error):
    """A forward that fails for more than `limit` tokens, and otherwise returns the tokens of its batch."""
    sizes = []

    def forward(batch):
        sizes.append(sum(lengths[i] for i in batch))
        if sizes[-1] > limit:
            raise error
        return sizes[-1]

    forward.sizes = sizes
    return forward


CPU = torch.device("cpu")
CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 4096 bytes"
)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), CPU_ERROR]
)
def test_out_of_memory_halves_the_budget_and_loses_nothing(error, caplog):
    lengths = [7, 3, 8, 2, 5, 5, 6, 4]
    budget = TokenBudget(CPU, 40)
    forward = out_of_memory_above(12, lengths, error)
    results = run(budget, lengths, forward)
    assert sorted(i for batch, _ in results for i in batch) == list(range(8))
    assert all(tokens == sum(lengths[i] for i in batch) <= 12 for batch, tokens in results)
    assert forward.sizes[0] == 40
    assert budget.tokens == 7  # half of 40, then of the 15 that failed next
    assert "out of memory at 40 tokens: going on with batches of 20" in caplog.text
    assert run(budget, [5, 2, 5], len) == [([0], 1), ([2, 1], 2)]


def test_a_sequence_that_never_fits_raises():
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        run(TokenBudget(CPU, 10), [9, 1], out_of_memory_above(5, [9, 1], error))


def test_other_errors_are_raised_as_they_are():
    calls = []

    def broken(batch):
        calls.append(batch)
        raise RuntimeError("expected scalar type Float but found Half")

    with pytest.raises(RuntimeError, match="expected scalar type"):
        run(TokenBudget(CPU, 10), [1, 2], broken)
    assert len(calls) == 1
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert"))


def test_lower_never_rises():
    budget = TokenBudget(CPU, 10)
    budget.lower(4)
    budget.lower(8)
    assert budget.tokens == 4
    budget.lower(0)
    assert budget.tokens == 1


def test_prefetch_map_keeps_order_and_works_on_another_thread():
    threads, done = set(), []

    def square(x):
        threads.add(threading.get_ident())
        done.append(x)
        return x * x

    squares = prefetch_map(square, iter(range(6)))
    assert next(squares) == 0
    assert list(squares) == [1, 4, 9, 16, 25]
    assert done == list(range(6))
    assert len(threads - {threading.get_ident()}) == 1  # all but the first item


def test_prefetch_map_reads_no_more_than_it_needs():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    stream = prefetch_map(lambda x: x, items())
    next(stream)
    assert len(taken) == 2
    next(stream)
    assert len(taken) == 3


def test_prefetch_map_computes_a_single_item_on_the_callers_thread():
    assert list(prefetch_map(lambda x: threading.get_ident(), ["one"])) == [threading.get_ident()]
    assert list(prefetch_map(str, [])) == []


def test_prefetch_map_hands_out_what_came_before_its_source_failed():
    def items():
        yield 1
        yield 2
        raise OSError("the source is gone")

    stream = prefetch_map(lambda x: x, items())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(stream)


def test_prefetch_map_raises_in_place():
    def fail_at_two(x):
        if x == 2:
            raise ValueError("two")
        return x

    stream = prefetch_map(fail_at_two, range(5))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(stream)
