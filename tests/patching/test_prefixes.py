"""Texts that begin alike: the same vectors from fewer tokens, within a call and across calls."""

import copy

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from embedfuse.nn import prefixes, tower
from embedfuse.testing import assert_as_good
from tests.patching.decoders import (
    DEEP,
    FAMILIES,
    TIGHT,
    batch_of,
    embed,
    make_model,
    texts,
)
from tests.patching.encoders import VOCABULARY, exact_states, states


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_runs_shared_prefixes_once(family, side, computed):
    model = make_model(family)
    batch = batch_of(DEEP, side)
    expected, pooled = states(model, batch), embed(model, DEEP, side)
    exact = exact_states(model, batch), embed(copy.deepcopy(model).double(), DEEP, side)
    embedfuse.patch(model)
    assert_as_good(states(model, batch), expected, exact[0])
    assert_as_good(embed(model, DEEP, side), pooled, exact[1])
    distinct = {tuple(text[: n + 1]) for text in DEEP for n in range(len(text))}
    assert computed[-2:] == [len(distinct)] * 2


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_steps(pooling, monkeypatch, computed):
    """A prefix that spans several steps: run in the first two, kept by the second, read from then on."""
    model = make_model("mistral")
    sequences = texts(*([40 + i, 41, 42] for i in range(20)))
    expected = embed(model, sequences, pooling=pooling)
    embedfuse.patch(model)
    monkeypatch.setattr(tower, "STEP_TOKENS", 40)
    monkeypatch.setattr("embedfuse.patching.forward.decoder.STEP_TOKENS", 40)
    computed.clear()
    assert_close(embed(model, sequences, pooling=pooling), expected, **TIGHT)
    if pooling == "last":
        assert computed == [39, 39, 36]
    else:
        assert computed == [39] * 5


def test_turned_off_every_token_runs(computed):
    model = make_model("llama")
    expected = embed(model, DEEP)
    embedfuse.patch(model, reuse_prefixes="off")
    assert_close(embed(model, DEEP), expected, **TIGHT)
    assert computed[-1] == sum(map(len, DEEP))


def test_little_in_common_is_not_worth_it(computed):
    model = make_model("llama")
    sequences = [[1, *range(10 + i, 60 + i)] for i in range(4)]
    embedfuse.patch(model)
    embed(model, sequences)
    assert computed[-1] == sum(map(len, sequences))


def test_windows_are_counted_in_the_whole_text():
    """mistral's window of 6: the last tokens see no shared one."""
    model = make_model("mistral")
    sequences = texts(list(range(40, 50)), list(range(40, 48)), [60])
    expected = embed(model, sequences)
    embedfuse.patch(model)
    assert_close(embed(model, sequences), expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_at_most_twice_the_originals(dtype):
    exact = make_model("mistral").double()
    model = make_model("mistral").to(dtype)
    exact.load_state_dict(model.state_dict())
    reference = embed(exact, DEEP)
    own = embed(model, DEEP)
    embedfuse.patch(model, reuse_prefixes="stream")
    for _ in range(3):
        assert_as_good(embed(model, DEEP), own, reference)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_final_norm_in_fp32(pooling):
    model = make_model("mistral").bfloat16()
    model.norm.float()
    expected = embed(model, DEEP, pooling=pooling)
    embedfuse.patch(model)
    found = embed(model, DEEP, pooling=pooling)
    assert found.dtype == expected.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=0.03)


def test_no_text_at_all():
    model = make_model("llama")
    embedfuse.patch(model)
    ids = torch.zeros(0, 5, dtype=torch.long)
    with torch.no_grad():
        for pooling in ("last", "mean"):
            assert embedfuse.embed(model, ids, pooling=pooling).shape == (0, 48)


def test_gradients_run_every_token(computed):
    model = make_model("llama")
    embedfuse.patch(model)
    embedfuse.embed(model, **batch_of(DEEP), pooling="last").sum().backward()
    assert computed[-1] == sum(map(len, DEEP))


def test_random_batches(monkeypatch):
    """Against every token run, with few words so that prefixes of all depths are shared."""
    model = make_model("qwen3")
    other = make_model("qwen3")
    embedfuse.patch(model, reuse_prefixes="stream")
    embedfuse.patch(other, reuse_prefixes="off")
    monkeypatch.setattr("embedfuse.patching.forward.decoder.STEP_TOKENS", 50)
    monkeypatch.setattr(prefixes, "MIN_KEPT_TOKENS", 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(1, 30, (12,), generator=generator).tolist()
        sequences = [
            torch.randint(3, (n,), generator=generator).add(VOCABULARY - 3).tolist()
            for n in lengths
        ]
        for pooling in ("last", "mean"):
            expected = embed(other, sequences, "left", pooling)
            assert_close(embed(model, sequences, "left", pooling), expected, **TIGHT)


def test_options_that_are_not_accepted():
    model = make_model("llama")
    with pytest.raises(ValueError, match="reuse_prefixes=True: accepted are off, batch, stream"):
        embedfuse.patch(model, reuse_prefixes=True)
    embedfuse.patch(model, reuse_prefixes="off")
    assert embedfuse.patch(model) is embedfuse.report(model)
    assert embedfuse.patch(model, reuse_prefixes="off") is embedfuse.report(model)
    with pytest.raises(ValueError) as error:
        embedfuse.patch(model, reuse_prefixes="stream")
    assert str(error.value) == (
        "reuse_prefixes='stream': this LlamaModel was patched with reuse_prefixes='off'; to change that, "
        "call embedfuse.unpatch on it and patch it again"
    )
    with pytest.raises(
        ValueError,
        match=r"^attention='bidirectional', reuse_prefixes='batch': this LlamaModel was patched with "
        r"attention=None, reuse_prefixes='off'; ",
    ):
        embedfuse.patch(model, attention="bidirectional")
