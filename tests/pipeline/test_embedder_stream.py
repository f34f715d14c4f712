"""Order across windows and batches, reading ahead, threads, memory, and what is printed."""

import gc
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from embedfuse.pipeline import pipeline
from tests.pipeline.reference import tensors

ALL = ("dense", "sparse", "multi")
CPU_ERROR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"


def assert_same(found, expected, atol=2e-6):
    assert len(found) == len(expected)
    assert [len(x) for x in found.multi] == [len(x) for x in expected.multi]
    for name, value in tensors(found, 2000).items():
        torch.testing.assert_close(value, tensors(expected, 2000)[name], rtol=0, atol=atol)


@pytest.fixture
def small_windows(embedder, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 4)
    monkeypatch.setattr(embedder._pipeline.budget, "tokens", 60)


@pytest.mark.parametrize(("window_texts", "characters"), [(1, 2**20), (5, 2**20), (256, 300)])
@pytest.mark.parametrize("budget", [1, 300])
def test_order_is_kept(embedder, texts, monkeypatch, window_texts, characters, budget):
    texts = texts[::5] * 2
    expected = embedder.encode(texts, ALL)
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", window_texts)
    monkeypatch.setattr(pipeline, "WINDOW_CHARACTERS", characters)
    monkeypatch.setattr(embedder._pipeline.budget, "tokens", budget)
    assert_same(embedder.encode(texts, ALL), expected)


def test_windows_are_cut_by_characters(monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_CHARACTERS", 10)
    found = list(
        pipeline.windows(
            ["1234", "123456", "1" * 99, "", "123456789", "1"],
            lambda text: pipeline.length_of(text, 7),
        )
    )
    assert found == [(0, ["1234", "123456"]), (2, ["1" * 99, "", "123456789"]), (5, ["1"])]


def test_iter_encode_reads_no_more_than_it_needs(embedder, texts, small_windows):
    taken = []

    def read():
        for text in texts:
            taken.append(text)
            yield text

    stream = embedder.iter_encode(read(), ALL)
    assert taken == []
    parts = [next(stream)]
    assert (len(parts[0]), len(taken)) == (4, 8)  # the window that runs and the one being tokenised
    parts.append(next(stream))
    assert len(taken) == 12
    parts += stream
    assert taken == texts
    assert_same(type(parts[0]).cat(parts), embedder.encode(texts, ALL), atol=0)


def test_an_abandoned_stream_leaves_no_thread(embedder, texts, small_windows):
    before = threading.active_count()
    stream = embedder.iter_encode(texts)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_a_generator_that_fails_raises_its_own_error(embedder, texts, small_windows):
    def read():
        yield from texts[:6]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        embedder.encode(read())


def test_threads(embedder, texts):
    calls = [(texts[i::4], outputs) for i in range(4) for outputs in (ALL, ("dense",))]
    alone = [embedder.encode(*call) for call in calls]
    start = threading.Barrier(len(calls))

    def encode(call):
        start.wait()
        return embedder.encode(*call)

    with ThreadPoolExecutor(len(calls)) as pool:
        together = list(pool.map(encode, calls))
    for found, expected in zip(together, alone, strict=True):
        assert np.array_equal(found.dense, expected.dense)
        for name, value in tensors(found, 2000).items():
            assert torch.equal(value, tensors(expected, 2000)[name])


def test_threads_with_different_lengths(embedder, texts):
    # Truncation is a setting of the tokenizer that all threads share.
    tokenize = embedder._pipeline.tokenize
    expected = {n: tokenize(texts, n) for n in (5, 17, 8192)}
    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            found = dict(
                zip(expected, pool.map(lambda n: tokenize(texts, n), expected), strict=True)
            )
            assert found == expected


def test_out_of_memory_loses_nothing(embedder, texts, monkeypatch, caplog):
    expected = embedder.encode(texts, ALL)
    states, sizes = embedder.model.sequence_states, []

    def forward(input_ids, packed, pooling=None):
        sizes.append(packed.tokens)
        if packed.tokens > max(1500, packed.max_seqlen):
            raise RuntimeError(CPU_ERROR)
        return states(input_ids, packed, pooling)

    monkeypatch.setattr(embedder.model, "sequence_states", forward, raising=False)
    monkeypatch.setattr(embedder._pipeline.budget, "tokens", 8192)
    assert_same(embedder.encode(texts, ALL), expected)
    assert sizes[0] > 1500
    assert "out of memory at" in caplog.text
    sizes.clear()
    embedder.encode(texts, ALL)
    assert max(sizes) <= 1500  # remembered


def test_other_errors_of_the_forward_are_raised(embedder, texts, monkeypatch):
    def forward(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(embedder.model, "sequence_states", forward, raising=False)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        embedder.encode(texts)


@pytest.mark.filterwarnings("error")
def test_silent_by_default(embedder, texts, capsys, caplog):
    with caplog.at_level(logging.DEBUG):
        embedder.encode(texts, ALL)
        list(embedder.iter_encode(iter(texts[:3])))
        embedder.compute_score([("a", "b")])
    assert capsys.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("embedfuse")]


def test_progress_bar(embedder, texts, capsys):
    embedder.encode(texts, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{len(texts)}/{len(texts)}" in err
    list(embedder.iter_encode(iter(texts), show_progress=True))  # of unknown length
    assert f"{len(texts)}text" in capsys.readouterr().err
    embedder.compute_score([("a", "b")] * 7, show_progress=True)
    assert "7/7" in capsys.readouterr().err


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow(embedder):
    def requests(n: int) -> int:
        for i in range(n):
            embedder.encode([f"a short request, the {i}th", "and another"], ALL)
            if i % 6 == 0:
                embedder.compute_score([(f"query {i}", "passage")])
        gc.collect()
        return resident_bytes()

    before = requests(60)
    assert requests(300) - before < 4 * 2**20
