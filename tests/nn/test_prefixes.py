"""Kept prefixes: how much of a text they give; on a simulated GPU, which stream waits for which, and how long
memory is held."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embedfuse.nn.prefixes import Prefix, PrefixCache, longest_prefix, shared_steps
from embedfuse.packing import end_to_end

GPU = torch.device("cuda", 0)
INSTRUCTION = list(range(5, 32))


class Stream:
    """Records what is launched on it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.append((self.name, "records"))
        return f"event of {self.name}"

    def wait_event(self, event):
        self.log.append((self.name, f"waits for {event}"))


class OnGpu(torch.Tensor):
    """A tensor in the memory of the simulated GPU."""

    device, is_cuda = GPU, True
    current: Stream

    def clone(self):
        OnGpu.current.log.append((OnGpu.current.name, "writes"))
        return super().clone()

    def record_stream(self, stream):
        self.recorded = [*getattr(self, "recorded", []), stream.name]


@pytest.fixture
def streams(monkeypatch):
    log = []
    found = SimpleNamespace(log=log, one=Stream("one", log), two=Stream("two", log))

    def current_stream(device):
        assert device == GPU
        return OnGpu.current

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    return found


def call(cache, sequences, stream, kind=OnGpu, layers=2):
    """Run a batch as a tower does, with token ids as keys and values; returns the keys of each sequence."""
    OnGpu.current = stream
    ids, packed = end_to_end(sequences, torch.device("cpu"))
    steps = shared_steps(ids, packed, 1000, cache, "weights")
    found = {}
    for step in steps or ():
        for layer in range(layers):
            own = ids[step.tokens].float()[:, None, None].as_subclass(kind)
            if isinstance(stream, Stream) and step.reused:
                stream.log.append((stream.name, "reads"))
            key, value = step.gather(layer, own, -own)
            assert torch.equal(key, -value)
        parts = torch.Tensor(key).flatten().long().split(step.keys.lengths)
        found |= {i: part.tolist() for i, part in zip(step.sequences.tolist(), parts, strict=True)}
    return [found[i] for i in range(len(sequences))] if found else None


def keep(streams):
    cache = PrefixCache()
    call(cache, [[*INSTRUCTION, 40]], streams.one)
    call(cache, [[*INSTRUCTION, 41]], streams.one)
    assert streams.log == [("one", "writes")] * 4 + [("one", "records")]
    streams.log.clear()
    (prefix,) = cache.prefixes("weights")
    return cache, [t for layer in prefix.layers for t in layer]


def test_another_stream_waits_and_is_waited_for(streams):
    cache, kept = keep(streams)
    assert call(cache, [[*INSTRUCTION, 42]], streams.two) == [[*INSTRUCTION, 42]]
    assert streams.log == [("two", "waits for event of one"), *[("two", "reads")] * 2]
    assert [t.recorded for t in kept] == [["two"]] * 4


def test_the_same_stream_is_in_order_already(streams):
    cache, kept = keep(streams)
    assert call(cache, [[*INSTRUCTION, 42]], streams.one) == [[*INSTRUCTION, 42]]
    assert streams.log == [("one", "reads")] * 2
    assert not any(hasattr(t, "recorded") for t in kept)


def test_on_the_cpu_no_stream_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    cache = PrefixCache()
    for last in (40, 41, 42):
        found = call(cache, [[*INSTRUCTION, last]], None, torch.Tensor)
    assert found == [[*INSTRUCTION, 42]]


@pytest.mark.parametrize(
    ("text", "tokens"), [([1, 2, 3, 4], 3), ([1, 2, 3], 2), ([1, 2, 3, 4, 5], 4)]
)
def test_the_last_token_of_a_text_is_left_to_run(text, tokens):
    prefix = Prefix(np.array([1, 2, 3, 4]))
    found = longest_prefix([prefix], np.array(text), 0)
    assert found[0] is prefix
    assert found[1] == tokens
