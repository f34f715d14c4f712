"""What keeps a GPU busy: no forward waits for it or for a copy to it, and results come one batch later."""

from itertools import pairwise

import pytest
import torch

from embedfuse import Embedder, ops
from embedfuse.pipeline import scores
from embedfuse.pipeline.batches import delayed
from embedfuse.pipeline.embeddings import OUTPUTS
from tests.no_wait import META, NoTensorOfAList, NoWait
from tests.pipeline.families import make, write_sentence_transformers
from tests.pipeline.reference import tensors


@pytest.fixture
def copied(monkeypatch):
    """What to_device copied, as it does for a GPU."""
    taken = []

    def to_device(device, *tensors):
        taken.append([t.shape for t in tensors])
        return tuple(t.to(device, non_blocking=True) for t in tensors)

    for module in ("packing", "nn.prefixes", "pipeline.embeddings", "pipeline.scores"):
        monkeypatch.setattr(f"embedfuse.{module}.to_device", to_device)
    # torch knows no autocast on this device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)
    return taken


def moved(embedder):
    """The pipeline with its model and heads on the device."""
    embedder.model.to(META)
    for head in (embedder._pipeline.heads.sparse, embedder._pipeline.heads.multi):
        if head is not None:
            head.to(META)
    return embedder._pipeline


def forward(copied, embedder, sequences, outputs, counts=None):
    pipeline = moved(embedder)
    copied.clear()  # what the check in patch copied
    with NoTensorOfAList(), NoWait():
        return pipeline._forward(sequences, outputs, torch.float32, counts)


SEQUENCES = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]


@pytest.mark.parametrize("outputs", [("dense",), OUTPUTS])
def test_an_encoder_waits_for_nothing(m3_folder, copied, outputs):
    found = forward(copied, Embedder(m3_folder, device="cpu"), SEQUENCES, outputs)
    assert found.dense.shape == (3, 64)
    assert found.dense.device == META
    assert copied == [[(10,), (4,)]]
    if outputs == OUTPUTS:
        assert (found.multi.shape, found.kept.index.shape) == ((10, 64), (10,))
        assert found.packed.ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("kind", ["bert", "mistral", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
@pytest.mark.parametrize("reuse", ["off", "stream"])
def test_towers_wait_for_nothing(tmp_path, copied, kind, pooling, reuse):
    write_sentence_transformers(make(tmp_path, kind), pooling)
    embedder = Embedder(str(tmp_path), device="cpu", reuse_prefixes=reuse)
    alike = [[5] * 20 + [i] for i in range(6, 16)]
    found = forward(copied, embedder, alike + SEQUENCES, ("dense",))
    assert found.dense.shape == (13, 48)
    shares = reuse == "stream" and kind != "bert"
    assert len(copied) == 1 + shares
    if shares:  # ids, and one copy of all indices of shared tokens
        assert len(copied[1]) == 6


def test_pooling_of_the_texts_own_tokens_waits_for_nothing(tmp_path, copied):
    write_sentence_transformers(make(tmp_path, "mistral"), "mean")
    embedder = Embedder(str(tmp_path), device="cpu")
    found = forward(copied, embedder, SEQUENCES, ("dense",), counts=[2, 1, 3])
    assert found.dense.shape == (3, 48)
    assert len(copied) == 2


def test_scores_wait_for_nothing(m3_folder, copied):
    pipeline, sent = moved(Embedder(m3_folder, device="cpu")), []
    pipeline.budget.tokens = 6  # two batches of queries
    queries = scores.Side(SEQUENCES, [0, 2, 1, 2])
    passages = scores.Side([[5, 6, 7, 8], [9, 10]], [0, 0, 1, 1])
    with NoTensorOfAList(), NoWait():
        scores.start_scores(
            pipeline, queries, passages, lambda *tensors: sent.append(tensors), None
        )
    lexical = [[(n,), (texts + 1,), (n,), (n,)] for n, texts in ((6, 1), (4, 2), (6, 2))]
    shapes = [[t.shape for t in tensors if t is not None] for tensors in sent]
    assert shapes == [*lexical, [(4,), (4,)]]  # no dense vector, no multi-vector


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x[[1, 0]],
        lambda x: x.__setitem__(([1, 0],), x[:2]),
        lambda x: torch.arange(3).to(META),
        lambda x: torch.tensor([1, 2], device=META),
        lambda x: ops.sparse_scatter(
            x, torch.zeros(4, dtype=torch.int64, device=META), cu_seqlens=x.int()
        ),
    ],
)
def test_what_waits_is_found(wait):
    x = torch.empty(4, device=META)
    with (
        pytest.raises((RuntimeError, AssertionError)),
        NoTensorOfAList(),
        NoWait(),
    ):
        wait(x)


def test_ids_that_the_table_has_not_are_found_on_the_host(m3_folder, copied):
    with pytest.raises(IndexError, match="token 2000; accepted are 0 to 1999"):
        forward(copied, Embedder(m3_folder, device="cpu"), [[5, 2000]], ("dense",))


class Late:
    """ToHost of a device with one batch in flight: results are there only after the wait."""

    in_flight = 1

    def __init__(self, device):
        self.log = []
        Late.last = self

    def __call__(self, *tensors):
        number = sum(event == "start" for event, _ in self.log)
        self.log.append(("start", number))
        copies = [None if t is None else torch.zeros_like(t) for t in tensors]

        def wait():
            self.log.append(("wait", number))
            for copy, tensor in zip(copies, tensors, strict=True):
                if copy is not None:
                    copy.copy_(tensor)
            return tuple(copies)

        return wait


@pytest.fixture
def late(embedder, monkeypatch):
    monkeypatch.setattr("embedfuse.pipeline.pipeline.ToHost", Late)
    monkeypatch.setattr("embedfuse.pipeline.pipeline.WINDOW_TEXTS", 4)
    monkeypatch.setattr(embedder._pipeline.budget, "tokens", 60)


def test_each_batch_starts_before_the_one_before_is_waited_for(embedder, texts, late):
    stream = embedder.iter_encode(texts, OUTPUTS)
    parts = list(stream)
    log = Late.last.log
    count = len(log) // 2
    assert count > len(parts) > 5  # windows of several batches
    expected = [("start", 0)]
    for i in range(1, count):
        expected += [("start", i), ("wait", i - 1)]
    assert log == [*expected, ("wait", count - 1)]
    assert [len(part) for part in parts[:-1]] == [4] * (len(parts) - 1)


def test_scores_are_waited_for_once_the_next_pairs_have_started(embedder, texts, late, monkeypatch):
    pairs = list(zip(texts[:10], texts[5:15], strict=True))
    expected = embedder.compute_score(pairs)
    sizes, start = [], scores.start_scores

    def counted(*args):
        before = len(Late.last.log)
        result = start(*args)
        sizes.append(len(Late.last.log) - before)  # nothing but starts
        return result

    monkeypatch.setattr(scores, "ToHost", Late)
    monkeypatch.setattr(scores, "start_scores", counted)
    found = embedder.compute_score(pairs)
    assert found == expected
    assert len(sizes) == 3
    assert max(sizes) > 3  # several batches of queries, or of passages
    ends = [sum(sizes[:i]) for i in range(4)]
    started, waited = (
        [[(event, i) for i in range(a, b)] for a, b in pairwise(ends)]
        for event in ("start", "wait")
    )
    log = [*started[0], *started[1], *waited[0], *started[2], *waited[1], *waited[2]]
    assert [event for event, _ in Late.last.log] == [event for event, _ in log]
    assert sorted(Late.last.log) == sorted(log)


def test_results_are_the_same(embedder, texts, monkeypatch):
    monkeypatch.setattr("embedfuse.pipeline.pipeline.WINDOW_TEXTS", 4)
    monkeypatch.setattr(embedder._pipeline.budget, "tokens", 60)
    expected = tensors(embedder.encode(texts, OUTPUTS), 2000)
    monkeypatch.setattr("embedfuse.pipeline.pipeline.ToHost", Late)
    found = embedder.encode(texts, OUTPUTS)
    assert all(array.base is None for array in found.multi)
    for name, value in tensors(found, 2000).items():
        assert torch.equal(value, expected[name])


def test_memory_that_runs_out_loses_nothing(embedder, texts, late, monkeypatch):
    expected = embedder.encode(texts).dense
    states = embedder.model.sequence_states

    def forward(input_ids, packed, pooling=None):
        if packed.tokens > max(30, packed.max_seqlen):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states(input_ids, packed, pooling)

    monkeypatch.setattr(embedder.model, "sequence_states", forward, raising=False)
    found = torch.from_numpy(embedder.encode(texts).dense)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=2e-6)


def test_what_came_before_an_error_is_handed_out(embedder, texts, late):
    expected = embedder.encode(texts[:4]).dense
    stream = embedder.iter_encode([*texts[:4], None])
    torch.testing.assert_close(next(stream).dense, expected, rtol=0, atol=2e-6)
    with pytest.raises(TypeError, match=r"texts\[4\]"):
        next(stream)


def test_delayed():
    taken = []

    def items(n):
        for i in range(n):
            taken.append(i)
            yield i

    for count, read in ((0, 1), (1, 2), (3, 4)):
        taken.clear()
        stream = delayed(items(6), count)
        assert next(stream) == 0
        assert len(taken) == read
        assert list(stream) == [1, 2, 3, 4, 5]
    assert list(delayed([], 2)) == []
    assert list(delayed([1], 2)) == [1]


def test_delayed_is_closed_with_its_source():
    closed = []

    def items():
        try:
            yield from range(5)
        finally:
            closed.append(True)

    stream = delayed(items(), 1)
    next(stream)
    stream.close()
    del stream
    assert closed == [True]
