"""Texts that begin alike: the same vectors from fewer tokens, within a call and across calls."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from embedfuse.nn import decoder, prefixes, tower
from embedfuse.nn.prefixes import PrefixCache
from tests.patching.conftest import VOCABULARY, states
from tests.patching.test_decoder import FAMILIES, TIGHT, make_model

INSTRUCTION = list(range(5, 32))  # 27 tokens


def texts(*tails: list[int]) -> list[list[int]]:
    return [INSTRUCTION + tail for tail in tails]


DEEP = [
    *texts([40, 41, 42, 43], [40, 41, 42, 44, 45], [40, 41], [40, 41], [50], [], [60, 61, 62]),
    [99],
    [5, 6, 7],
    [100, 101, 102, 103],
]


def batch_of(sequences: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        place = slice(len(tokens)) if side == "right" else slice(length - len(tokens), length)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def embed(model, sequences, side="right", pooling="last"):
    with torch.no_grad():
        return embedfuse.embed(model, **batch_of(sequences, side), pooling=pooling)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Tokens of every run through the layers."""
    counts, run = [], decoder.run

    def counting(layers, norm, x, *args, **kwargs):
        counts.append(len(x))
        return run(layers, norm, x, *args, **kwargs)

    monkeypatch.setattr(decoder, "run", counting)
    return counts


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_runs_shared_prefixes_once(family, side, computed):
    model = make_model(family)
    batch = batch_of(DEEP, side)
    expected, pooled = states(model, batch), embed(model, DEEP, side)
    embedfuse.patch(model)
    assert_close(states(model, batch), expected, **TIGHT)
    assert_close(embed(model, DEEP, side), pooled, **TIGHT)
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
    monkeypatch.setattr("embedfuse.patching.decoder.STEP_TOKENS", 40)
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


class TestStream:
    """One query after the other."""

    @pytest.fixture(params=FAMILIES)
    def model(self, request):
        return make_model(request.param)

    def test_a_prefix_is_run_in_two_calls_and_read_from_then_on(self, model, computed):
        queries = texts([40, 41], [50, 51, 52], [60], [60, 61], [40, 41])
        expected = [embed(model, [query]) for query in queries]
        embedfuse.patch(model, reuse_prefixes="stream")
        computed.clear()
        for query, vector in zip(queries, expected, strict=True):
            assert_close(embed(model, [query]), vector, **TIGHT)
        assert computed == [29, 30, 1, 2, 2]

    def test_a_part_of_a_kept_prefix_serves_too(self, model, computed):
        queries = texts([40, 41], [40, 42], [50], [50, 51])  # kept: the instruction and 40
        expected = [embed(model, [query]) for query in queries]
        embedfuse.patch(model, reuse_prefixes="stream")
        computed.clear()
        for query, vector in zip(queries, expected, strict=True):
            assert_close(embed(model, [query]), vector, **TIGHT)
        assert computed == [29, 29, 1, 2]

    def test_batches(self, model, computed):
        batches = [DEEP, DEEP[::-1], texts([70], [71, 72])]
        expected = [embed(model, batch, "left") for batch in batches]
        embedfuse.patch(model, reuse_prefixes="stream")
        computed.clear()
        for batch, vectors in zip(batches, expected, strict=True):
            assert_close(embed(model, batch, "left"), vectors, **TIGHT)
        assert computed[2] == 3

    @pytest.mark.parametrize(
        "change", ["in place", "load_state_dict", "dtype", "another module", "fused optimiser"]
    )
    def test_a_change_of_the_weights_is_seen(self, model, change):
        queries = texts([40], [41], [42])
        embedfuse.patch(model, reuse_prefixes="stream")
        for query in queries[:2]:
            embed(model, [query])
        projection = model.layers[0].self_attn.v_proj
        if change == "in place":
            with torch.no_grad():
                projection.weight.mul_(-1)
        elif change == "load_state_dict":
            model.load_state_dict({n: -2 * t for n, t in model.state_dict().items()})
        elif change == "dtype":
            model.double()
        elif change == "fused optimiser":  # counts up no version
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
            embedfuse.embed(model, **batch_of(queries), pooling="last").sum().backward()
            for query in queries[:2]:
                embed(model, [query])
            optimizer.step()
            optimizer.zero_grad()
        else:
            model.layers[0].self_attn.v_proj = torch.nn.Linear(
                projection.in_features, projection.out_features, bias=projection.bias is not None
            )
        found = embed(model, [queries[2]])
        embedfuse.unpatch(model)
        assert_close(found, embed(model, [queries[2]]), **TIGHT)

    def test_training_is_seen(self, model):
        queries = texts([40], [41], [42])
        embedfuse.patch(model, reuse_prefixes="stream")
        for query in queries[:2]:
            embed(model, [query])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(**batch_of(queries)).last_hidden_state.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found = embed(model, [queries[2]])
        embedfuse.unpatch(model)
        assert_close(found, embed(model, [queries[2]]), **TIGHT)

    def test_dropout_is_not_remembered(self, model, computed):
        for block in model.layers:
            block.self_attn.attention_dropout = 0.5
        embedfuse.patch(model, reuse_prefixes="stream")
        model.train()
        for query in texts([40], [41]):
            embed(model, [query])
        model.eval()
        found = embed(model, texts([42]))
        assert computed[-3:] == [28, 28, 28]
        embedfuse.unpatch(model)
        assert_close(found, embed(model, texts([42])), **TIGHT)

    def test_replicas_are_not_remembered(self, model):
        """DataParallel's have tensors in the place of parameters."""
        embedfuse.patch(model, reuse_prefixes="stream")
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                del module._parameters[name]
                setattr(module, name, None if p is None else p.detach())
        for query in texts([40], [41]):
            embed(model, [query])
        model.layers[0].self_attn.v_proj.weight.mul_(-1)
        found = embed(model, texts([42]))
        embedfuse.unpatch(model)
        assert_close(found, embed(model, texts([42])), **TIGHT)

    def test_moving_or_casting_forgets(self, model):
        """Back and forth, the weights may lie where they lay, with the version that they had."""
        embedfuse.patch(model, reuse_prefixes="stream")
        for query in texts([40], [41]):
            embed(model, [query])
        cache = model._embedfuse.prefixes
        assert len(cache.prefixes(cache.stamp)) == 1
        model.float()
        assert not cache.prefixes(cache.stamp)

    def test_threads(self, model):
        """Each with an instruction of its own, in a cache that has room for two."""
        queries = [[[i, *INSTRUCTION, 40 + n] for n in range(12)] for i in range(3)]
        expected = [[embed(model, [query]) for query in of_one] for of_one in queries]
        embedfuse.patch(model, reuse_prefixes="stream")
        embed(model, [queries[0][0]])
        embed(model, [queries[0][1]])
        cache = model._embedfuse.prefixes
        cache.max_bytes = 2 * cache.prefixes(cache.stamp)[0].nbytes
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda qs: [embed(model, [q]) for q in qs], queries))
        for one, other in zip(found, expected, strict=True):
            assert_close(torch.cat(one), torch.cat(other), **TIGHT)

    def test_layers_of_another_kind_are_not_remembered(self, model, computed):
        """What a LoRA layer does hangs on more than its parameters."""

        class Switched(torch.nn.Linear):
            sign = 1

            def forward(self, x):
                return self.sign * super().forward(x)

        own = model.layers[0].self_attn.v_proj
        switched = Switched(own.in_features, own.out_features)
        model.layers[0].self_attn.v_proj = switched
        embedfuse.patch(model, reuse_prefixes="stream")
        for query in texts([40], [41]):
            embed(model, [query])
        switched.sign = -1
        found = embed(model, texts([42]))
        embedfuse.unpatch(model)
        assert_close(found, embed(model, texts([42])), **TIGHT)

    def test_angles_that_hang_on_the_batch_are_not_remembered(self):
        rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}
        make = partial(make_model, "llama", rope_parameters=rope, max_position_embeddings=28)
        model, other = make(), make()
        embedfuse.patch(other, reuse_prefixes="off")  # the original's own angles keep a history
        queries = texts([], [40], list(range(40, 70)))
        expected = [embed(other, [query]) for query in queries]
        embedfuse.patch(model, reuse_prefixes="stream")
        for query, vector in zip(queries, expected, strict=True):
            assert_close(embed(model, [query]), vector, **TIGHT)

    def test_copies_start_anew(self, model, computed):
        embedfuse.patch(model, reuse_prefixes="stream")
        for query in texts([40], [41]):
            embed(model, [query])
        other = copy.deepcopy(model)
        embed(other, texts([42]))
        assert computed[-1] == 28
        embed(model, texts([42]))
        assert computed[-1] == 1


def test_the_cache_is_bounded(monkeypatch):
    model = make_model("llama")
    embedfuse.patch(model, reuse_prefixes="stream")
    cache = model._embedfuse.prefixes
    one = 20 * 2 * 2 * 12 * 4 * 3  # tokens, key and value, heads, head_dim, bytes, layers
    cache.max_bytes = 3 * one
    for start in range(10, 100, 10):
        for last in (1, 2):
            embed(model, [[start, *range(120, 139), last]])
    held = cache.prefixes(cache.stamp)
    assert [int(prefix.ids[0]) for prefix in held] == [70, 80, 90]
    assert sum(prefix.nbytes for prefix in held) == 3 * one
    embed(model, [[70, *range(120, 139), 3]])
    embed(model, [[100, *range(120, 139), 1]])
    embed(model, [[100, *range(120, 139), 2]])
    assert [int(prefix.ids[0]) for prefix in cache.prefixes(cache.stamp)] == [90, 70, 100]


def test_of_a_prefix_too_large_for_the_cache_the_beginning_is_kept(computed):
    model = make_model("llama")
    queries = texts([40], [41], [42], [43])
    expected = [embed(model, [query]) for query in queries]
    embedfuse.patch(model, reuse_prefixes="stream")
    model._embedfuse.prefixes.max_bytes = 20 * 2 * 2 * 12 * 4 * 3 + 100
    computed.clear()
    for query, vector in zip(queries, expected, strict=True):
        assert_close(embed(model, [query]), vector, **TIGHT)
    assert computed == [28, 28, 28, 8]


def test_the_cache_keeps_nothing_of_the_callers_batch():
    cache = PrefixCache()
    ids = torch.arange(100).numpy()
    cache.prefixes("a")
    cache.remember("a", ids[:30], [], None)
    ids[:] = 0
    assert cache.recurring([torch.arange(25).numpy()]) == (0, 24)


def test_another_stamp_empties_the_cache():
    cache = PrefixCache()
    cache.prefixes("a")
    ids = torch.arange(20).numpy()
    prefix = prefixes.Prefix(ids, [(torch.zeros(20, 1, 1), torch.zeros(20, 1, 1))])
    cache.remember("a", ids, [], prefix)
    assert cache.prefixes("a") == [prefix]
    assert cache.prefixes("b") == []
    cache.remember("a", ids, [], prefix)  # of a step that began before the change
    assert cache.prefixes("b") == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_at_most_twice_the_originals(dtype):
    exact = make_model("mistral").double()
    model = make_model("mistral").to(dtype)
    exact.load_state_dict(model.state_dict())
    reference = embed(exact, DEEP)
    own_error = (embed(model, DEEP).double() - reference).abs().max()
    embedfuse.patch(model, reuse_prefixes="stream")
    for _ in range(3):
        assert (embed(model, DEEP).double() - reference).abs().max() <= 2 * own_error


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
    monkeypatch.setattr("embedfuse.patching.decoder.STEP_TOKENS", 50)
    monkeypatch.setattr(prefixes, "KEPT_TOKENS", 3)
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
    with pytest.raises(ValueError, match=r"patched before with .*'off'.*, now .*'stream'"):
        embedfuse.patch(model, reuse_prefixes="stream")
