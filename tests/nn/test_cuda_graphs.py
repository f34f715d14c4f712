"""CudaGraphs on a torch.cuda that is played: which stream captures, and who waits for whom."""

import contextlib
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
    played = SimpleNamespace(main=Stream("main"), captures=[])

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        played.captures.append((pool, stream))
        yield

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
