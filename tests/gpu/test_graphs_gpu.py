"""CUDA graphs of patched models: the vectors of the forward that runs, in any order of shapes and threads."""

import copy
import threading

import pytest
import torch

import embedfuse
from tests.patching import decoders
from tests.patching.encoders import make_batch, make_model

pytestmark = pytest.mark.gpu
SHAPES = [(3,), (16,), (5, 9), (20, 3, 11, 1), (1,) * 9, (30, 29, 5), (60, 60), (60,) * 17]
FAMILIES = ["bert", "xlm_roberta", *decoders.FAMILIES]
# One bf16 step of numbers below 1: cuBLAS may choose another kernel for another number of rows.
CLOSE = {"rtol": 0, "atol": 2**-6}


@pytest.fixture(autouse=True)
def graphs_are_on(monkeypatch):
    monkeypatch.setenv("EMBEDFUSE_GRAPHS", "1")


def make(family: str, dtype=torch.bfloat16):
    if family in decoders.FAMILIES:
        model = decoders.make_model(family, head_dim=16)
    else:
        model = make_model(family, hidden_size=64)
    model.to("cuda", dtype)
    embedfuse.patch(model)
    return model


def pooled(model, lengths, pooling="last"):
    batch = {name: t.cuda() for name, t in make_batch(model, lengths).items()}
    with torch.inference_mode():
        return embedfuse.embed(model, **batch, pooling=pooling)


def eager(model, lengths, pooling="last"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDFUSE_GRAPHS", "0")
        return pooled(model, lengths, pooling)


def captured(model) -> int:
    return len(model._embedfuse.graphs)


@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_many_shapes(family, pooling):
    model = make(family)
    for _ in range(3):
        for lengths in SHAPES:
            expected = eager(model, lengths, pooling)
            torch.testing.assert_close(pooled(model, lengths, pooling), expected, **CLOSE)
    assert captured(model) >= 5, embedfuse.report(model).graphs


def test_fp32():
    """Our kernel reads lengths on the GPU; SDPA, which fp64 runs on, asks the host for them."""
    model = make("bert", torch.float32)
    for _ in range(3):
        torch.testing.assert_close(pooled(model, (5, 9)), eager(model, (5, 9)), rtol=0, atol=1e-5)
    assert captured(model)
    assert "lengths" in embedfuse.report(make("bert", torch.float64)).graphs


@pytest.mark.parametrize("family", ["xlm_roberta", "mistral"])
def test_moved_and_changed(family):
    model = make(family)
    for change in (
        lambda: model.cpu().cuda(),
        lambda: model.half().bfloat16(),
        lambda: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
        lambda: model.load_state_dict(
            {k: v * 0.9 for k, v in model.state_dict().items()}, assign=True
        ),
    ):
        for _ in range(3):
            torch.testing.assert_close(pooled(model, (5, 9)), eager(model, (5, 9)), **CLOSE)
        assert captured(model)
        change()
        torch.cuda.empty_cache()
    torch.testing.assert_close(pooled(model, (5, 9)), eager(model, (5, 9)), **CLOSE)


def test_threads_streams_and_two_models():
    models = [make("xlm_roberta"), make("mistral")]
    for model in models:
        assert embedfuse.warm_up(model, tokens=256, sequences=64, pooling="last")
    expected = {(i, s): eager(m, s) for i, m in enumerate(models) for s in SHAPES[:-1]}
    torch.cuda.synchronize()
    failures = []

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for n in range(100):
                i, lengths = (seed + n) % 2, SHAPES[(seed + n) % (len(SHAPES) - 1)]
                found = pooled(models[i], lengths)
                if not torch.allclose(found, expected[i, lengths], **CLOSE):
                    failures.append((i, lengths))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.xdist_group("memory")
def test_memory_is_bounded_and_given_back():
    model = make("xlm_roberta")
    model._embedfuse.graphs.forget()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert embedfuse.warm_up(model, tokens=1024, sequences=64) >= 10
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() - before
    assert held < 2**28 + 2**27, f"{held / 2**20:.0f} MiB"
    embedfuse.unpatch(model)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 2**26


def test_a_capture_of_the_users_own():
    """Inside it the original runs, as it did."""
    model = make("bert")
    batch = {name: t.cuda() for name, t in make_batch(model, (9,)).items()}
    batch.pop("attention_mask")
    with torch.no_grad():
        expected = copy.deepcopy(model)(**batch).last_hidden_state
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            embedfuse.unpatch(twin := copy.deepcopy(model))
            twin(**batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states = model(**batch).last_hidden_state
        graph.replay()
    torch.testing.assert_close(states, expected, **CLOSE)
    assert "captured into a CUDA graph" in str(embedfuse.report(model))
