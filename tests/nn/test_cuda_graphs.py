"""CudaGraphs on a torch.cuda that is played: which stream captures, and who waits for whom."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch

from embedfuse.nn.graphs import CudaGraphs


class Stream:
    def __init__(self, name="side", priority=0):
        self.name, self.priority, self.waited_for = name, priority, []

    def wait_stream(self, other):
        self.waited_for.append(other)


@pytest.fixture
def played(monkeypatch):
    """What CudaGraphs uses of torch.cuda. captures: (pool, stream) of each."""
    played = SimpleNamespace(main=Stream("main"), captures=[], pools=[], end=lambda: None)

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        played.captures.append((pool, stream))
        yield
        played.end()

    for name, value in {
        "graph_pool_handle": object,
        "Event": object,
        "Stream": lambda device=None, priority=0: Stream(priority=priority),
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: played.main,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        call = functools.partial(lambda name, *args: played.pools.append((name, *args)), name)
        monkeypatch.setattr(torch._C, name, call, raising=False)
    monkeypatch.setattr(CudaGraphs, "failed", None)
    return played


def test_graphs_of_one_pool_are_captured_on_one_stream(played):
    """torch hands out memory of a pool again to the stream alone that had it."""
    graphs, others = CudaGraphs(torch.device("cuda", 0)), CudaGraphs(torch.device("cuda", 0))
    for device_graphs in (graphs, graphs, others):
        device_graphs.capture(lambda: torch.ones(1))
    (pool, stream), again, (other_pool, _) = played.captures
    assert again == (pool, stream)
    assert other_pool is not pool
    assert stream.priority < 0
    assert (stream.waited_for, played.main.waited_for[:2]) == ([played.main] * 2, [stream] * 2)


def test_a_forward_that_raises_is_waited_for(played):
    """What it started may still read the buffers, which go back to the allocator."""

    def raises():
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        CudaGraphs(torch.device("cuda", 0)).capture(raises)
    assert [stream.name for stream in played.main.waited_for] == ["side"]
    assert played.captures == []
    assert CudaGraphs.failed is None


def test_after_a_failed_capture_there_are_no_others(played, monkeypatch):
    """torch's allocators may go on as if it were running: its pool is closed, and no model captures again."""

    def end():
        raise RuntimeError("operation failed due to a previous error during capture")

    graphs, others = CudaGraphs(torch.device("cuda", 0)), CudaGraphs(torch.device("cuda", 0))
    played.end = end
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(lambda: torch.ones(1))
    ((pool, _),) = played.captures
    assert played.pools == [("_cuda_endAllocateToPool", 0, pool), ("_cuda_releasePool", 0, pool)]
    for device_graphs in (graphs, others):
        with pytest.raises(RuntimeError, match="earlier capture failed: RuntimeError: operation"):
            device_graphs.capture(lambda: torch.ones(1))
    assert len(played.captures) == 1


def test_a_pool_that_torch_closed_is_not_released_again(played, monkeypatch):
    def closed(*args):
        raise RuntimeError("not currently recording to mempool_id")

    def forward():
        if played.captures:
            raise ValueError("a wrong text")
        return torch.ones(1)

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", closed)
    with pytest.raises(ValueError, match="a wrong text"):
        CudaGraphs(torch.device("cuda", 0)).capture(forward)
    assert played.pools == []
