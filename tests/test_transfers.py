"""Transfers on a simulated GPU: the test decides when copies happen, and records the streams."""

import pytest
import torch

from embedfuse import transfers
from embedfuse.transfers import ToHost, to_device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Played:
    """The parts of torch.cuda that transfers uses; copies to the host happen when the event is waited for."""

    def __init__(self):
        self.log, self.waiting, self.current = [], [], "main"

    class Stream:
        def __init__(self, played, device):
            self.played, self.device = played, device

        def wait_stream(self, other):
            self.played.log.append(f"copies wait for {other}")

    class Event:
        def __init__(self, played, blocking):
            assert blocking
            self.played = played

        def record(self, stream):
            self.copies, self.played.waiting = self.played.waiting, []

        def synchronize(self):
            self.played.log.append("host waits")
            with torch.inference_mode():
                for target, source in self.copies:
                    target.copy_(source)

    def stream(self, stream):
        played = self

        class Scope:
            def __enter__(self):
                played.current = "copies"

            def __exit__(self, *error):
                played.current = "main"

        return Scope()


class OnGpu(torch.Tensor):
    """A tensor in the memory of the simulated GPU, which records the streams that use it."""

    def record_stream(self, stream):
        self.recorded = stream


class Pinned(torch.Tensor):
    def copy_(self, source, non_blocking=False):
        assert non_blocking
        assert Pinned.played.current == "copies"
        Pinned.played.waiting.append((self.as_subclass(torch.Tensor), source.detach().clone()))
        return self.as_subclass(torch.Tensor)


@pytest.fixture
def played(monkeypatch):
    played = Pinned.played = Played()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Played.Stream(played, device))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Played.Event(played, blocking))
    monkeypatch.setattr(torch.cuda, "stream", played.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"{device}'s stream")
    monkeypatch.setattr(
        transfers,
        "pinned",
        lambda shape, dtype: torch.full(shape, -1, dtype=dtype).as_subclass(Pinned),
    )
    return played


def test_results_are_there_after_the_wait_and_not_before(played):
    to_host = ToHost(GPU)
    assert to_host.in_flight == 1
    first, second = (torch.tensor(x).as_subclass(OnGpu) for x in ([[1.0, 2.0]], [[3.0, 4.0]]))
    numbers = torch.tensor([7, 8, 9]).as_subclass(OnGpu)
    wait_first, wait_second = to_host(first, None, numbers), to_host(second)
    assert played.log == ["copies wait for cuda:0's stream"] * 2  # both started, and nothing waited
    assert all(t.recorded is to_host._stream for t in (first, second, numbers))
    (found,) = wait_second()
    assert found.tolist() == [[3.0, 4.0]]
    assert played.log[2:] == ["host waits"]
    found, nothing, others = wait_first()
    assert (found.tolist(), nothing, others.tolist()) == ([[1.0, 2.0]], None, [7, 8, 9])
    assert others.dtype == torch.int64


def test_from_the_cpu_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(transfers, "pinned", None)
    to_host = ToHost(CPU)
    assert to_host.in_flight == 0
    tensor = torch.ones(3)
    found, nothing = to_host(tensor, None)()
    assert found is tensor
    assert nothing is None
    assert to_device(CPU, tensor)[0] is tensor


def test_one_copy_takes_all_to_the_device(monkeypatch):
    copies = []

    class Buffer(torch.Tensor):
        def to(self, device, non_blocking):
            assert non_blocking
            copies.append((device, self.nbytes))
            return self.as_subclass(torch.Tensor).clone()

    empty = lambda shape, dtype: torch.empty(shape, dtype=dtype).as_subclass(Buffer)  # noqa: E731
    monkeypatch.setattr(transfers, "pinned", empty)
    tensors = [
        torch.tensor([5, 2**40, -1]),
        torch.tensor([0, 2, 3], dtype=torch.int32),
        torch.zeros(0, dtype=torch.int64),
        torch.arange(6.0).view(2, 3)[:, ::2],
        torch.tensor([True]),
    ]
    found = to_device(GPU, *tensors)
    assert copies == [(GPU, 32 + 16 + 0 + 16 + 16)]
    assert len({t.untyped_storage().data_ptr() for t in found}) == 1
    for got, expected in zip(found, tensors, strict=True):
        assert torch.equal(got, expected)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
