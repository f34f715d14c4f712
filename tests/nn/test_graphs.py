"""Buckets, the cache of graphs and what makes it start anew, on graphs that are recorded on the CPU."""

import logging
import threading

import pytest
import torch
from torch import Tensor, nn

from embedfuse.nn.graphs import SEQUENCES, TOKENS, GraphCache, Snapshot, bucket
from embedfuse.packing import LengthsUnknown
from tests.recorded_graphs import RecordedGraphs


class Doubling:
    """A batch of one tensor, of which the forward makes weight * x; `error` is raised instead."""

    def __init__(self, x: Tensor, weight: Tensor, size: int = 8, error: Exception | None = None):
        self.x, self.weight, self.size, self.error = x, weight, size, error
        self.key = (size,)

    def buffers(self):
        return (torch.zeros(self.size),)

    def fill(self, buffers):
        buffers[0][: len(self.x)] = self.x

    def forward(self, buffers):
        if self.error is not None:
            raise self.error
        return self.weight * buffers[0]

    def cut(self, output):
        return output[: len(self.x)]


def fits(snapshot):
    return None


@pytest.fixture
def module():
    linear = nn.Linear(4, 4).requires_grad_(False)
    linear.register_buffer("factor", torch.tensor(2.0))
    return linear


@pytest.fixture
def cache():
    RecordedGraphs.made.clear()
    return GraphCache(RecordedGraphs)


@pytest.mark.parametrize(
    ("tokens", "sequences", "found"),
    [
        (1, 1, (16, 1)),
        (16, 1, (16, 1)),
        (17, 2, (32, 8)),
        (129, 8, (256, 8)),
        (257, 9, (384, 64)),
        (1024, 64, (1024, 64)),
        (1025, 1, None),
        (1024, 65, None),
        (0, 1, None),
        (1, 0, None),
    ],
)
def test_bucket(tokens, sequences, found):
    assert bucket(tokens, sequences) == found


def test_padding_is_bounded_where_it_costs():
    for tokens in range(257, TOKENS[-1] + 1):
        assert bucket(tokens, 1)[0] - tokens <= bucket(tokens, 1)[0] / 3
    assert list(TOKENS) == sorted(TOKENS)
    assert list(SEQUENCES) == sorted(SEQUENCES)


def test_captured_the_second_time(cache, module):
    modules = [module]

    def doubled(*values):
        return cache.run(modules, Doubling(torch.tensor(values), module.factor), fits)

    assert doubled(1.0, 2.0) is None
    assert doubled(1.0, 2.0).tolist() == [2, 4]
    first = doubled(3.0)
    second = doubled(5.0)
    assert (first.tolist(), second.tolist()) == ([6], [10])  # the first is no view of a buffer
    (graphs,) = RecordedGraphs.made
    assert (graphs.captures, graphs.replays) == (1, 3)


def test_new_values_are_seen(cache, module):
    modules = [module]
    for factor in (2.0, 3.0, 5.0):
        module.factor.fill_(factor)
        found = cache.run(modules, Doubling(torch.ones(1), module.factor), fits)
    assert found.tolist() == [5]


def test_results_are_of_the_callers_mode(cache, module):
    modules = [module]
    for _ in range(2):
        found = cache.run(modules, Doubling(torch.ones(1), module.factor), fits)
    assert not found.is_inference()
    with torch.inference_mode():
        found = cache.run(modules, Doubling(torch.ones(2), module.factor), fits)
    assert found.is_inference()
    assert not cache.run(modules, Doubling(torch.ones(3), module.factor), fits).is_inference()


def changes():
    def transposed(m):
        m.weight.data = m.weight.data.t()

    def narrowed(m):
        m.weight.data = m.weight.data[:2]

    def copied(m):
        m.weight.data = m.weight.data.clone()

    def reinterpreted(m):
        m.weight.data = m.weight.data.view(torch.int32)

    def replaced(m):
        m.weight = nn.Parameter(m.weight.data)

    def removed(m):
        m.bias = None

    def another_buffer(m):
        m.factor = torch.tensor(2.0)

    def another_class(m):
        m.__class__ = type("Other", (nn.Linear,), {})

    return [f for f in locals().values() if callable(f)]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_a_snapshot_sees(change, module):
    modules = [module]
    snapshot = Snapshot(modules)
    with torch.no_grad():
        module.weight.mul_(2)
        module.load_state_dict(module.state_dict())
    assert snapshot.matches(modules)
    assert not snapshot.matches([module])  # another layout
    with torch.no_grad():
        change(module)
    assert not snapshot.matches(modules)


def test_freed_memory_does_not_come_back_as_other_weights(module):
    """The allocator gives a block of the same size again; the snapshot keeps the old one."""
    modules = [module]
    snapshot = Snapshot(modules)
    for _ in range(20):
        module.weight.data = torch.randn(4, 4)
        assert not snapshot.matches(modules)


def test_changed_modules_start_anew(cache, module):
    modules = [module]

    def call():
        return cache.run(modules, Doubling(torch.ones(1), module.factor), fits)

    assert [call() is None for _ in range(3)] == [True, False, False]
    module.factor = torch.tensor(7.0)
    assert call() is None
    assert call().tolist() == [7]
    first, second = RecordedGraphs.made
    assert (first.waits, first.captures, second.captures) == (1, 1, 1)


def test_least_lately_used_goes_first(module):
    """A graph of n numbers has buffers of 8 n bytes."""
    cache = GraphCache(RecordedGraphs, max_bytes=8 * 60)
    modules = [module]

    def call(size):
        batch = Doubling(torch.ones(1), module.factor, size)
        return cache.run(modules, batch, fits) is not None

    for size in (10, 20, 30):  # 60 fit
        assert (call(size), call(size)) == (False, True)
    assert len(cache) == 3
    call(10)
    assert call(8) is False
    assert call(8)  # 68: 20 goes
    assert len(cache) == 3
    RecordedGraphs.made.clear()
    captures = cache._device.captures
    assert call(10)
    assert call(30)
    assert cache._device.captures == captures
    assert call(20)  # seen before: captured at once; 68 again, and 8 goes
    assert cache._device.captures == captures + 1
    assert len(cache) == 3
    assert call(100) is False
    assert call(100)  # one stays, however large
    assert len(cache) == 1


def test_a_failed_capture_is_told_once(cache, module, caplog):
    modules = [module]
    error = RuntimeError("operation not permitted when stream is capturing")
    good, bad = (Doubling(torch.ones(1), module.factor, n, e) for n, e in ((4, None), (8, error)))
    with caplog.at_level(logging.WARNING, "embedfuse"):
        results = [cache.run(modules, batch, fits) for batch in (good, good, bad, bad, bad, good)]
    assert [r is None for r in results] == [True, False, True, True, True, True]
    assert cache.refusal == f"a capture failed: RuntimeError: {error}"
    assert [r.getMessage() for r in caplog.records] == [
        f"no CUDA graphs for this model: {cache.refusal}"
    ]
    assert len(cache) == 0
    module.factor = torch.tensor(7.0)  # another model, another try
    assert cache.run(modules, good, fits) is None
    assert cache.refusal is None


def test_lengths_that_only_the_gpu_has_are_no_failure(cache, module, caplog):
    modules = [module]
    batch = Doubling(torch.ones(1), module.factor, 8, LengthsUnknown("lengths"))
    assert [cache.run(modules, batch, fits) for _ in range(3)] == [None] * 3
    assert (cache.refusal, caplog.records) == ("lengths", [])


def test_a_refused_model_is_asked_once(cache, module):
    modules, asked = [module], []

    def refuse(snapshot):
        asked.append(snapshot)
        return "quantised"

    for _ in range(3):
        assert cache.run(modules, Doubling(torch.ones(1), module.factor), refuse) is None
    assert (len(asked), cache.refusal, len(RecordedGraphs.made)) == (1, "quantised", 0)


def test_forget(cache, module):
    modules = [module]
    for _ in range(2):
        cache.run(modules, Doubling(torch.ones(1), module.factor), fits)
    cache.forget()
    assert (len(cache), RecordedGraphs.made[0].waits) == (0, 1)
    assert cache.run(modules, Doubling(torch.ones(1), module.factor), fits) is None


def test_threads(cache, module):
    modules, failures = [module], []

    def work(seed):
        for i in range(40):
            n = (seed * 7 + i) % 16 + 1
            batch = Doubling(torch.full((n,), float(n)), module.factor, 8 if n <= 8 else 16)
            found = cache.run(modules, batch, fits)
            if found is not None and found.tolist() != [2.0 * n] * n:
                failures.append(n)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(cache) == 2
