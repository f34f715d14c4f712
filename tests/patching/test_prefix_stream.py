"""Prefixes that recur from call to call: read where they were computed, and forgotten when weights change."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from embedfuse.nn import prefixes
from embedfuse.nn.prefixes import PrefixCache
from tests.patching.decoders import (
    DEEP,
    FAMILIES,
    INSTRUCTION,
    TIGHT,
    batch_of,
    embed,
    make_model,
    texts,
)


@pytest.fixture(params=FAMILIES)
def model(request):
    return make_model(request.param)


def test_a_prefix_is_run_in_two_calls_and_read_from_then_on(model, computed):
    queries = texts([40, 41], [50, 51, 52], [60], [60, 61], [40, 41])
    expected = [embed(model, [query]) for query in queries]
    embedfuse.patch(model, reuse_prefixes="stream")
    computed.clear()
    for query, vector in zip(queries, expected, strict=True):
        assert_close(embed(model, [query]), vector, **TIGHT)
    assert computed == [29, 30, 1, 2, 2]


def test_a_part_of_a_kept_prefix_serves_too(model, computed):
    queries = texts([40, 41], [40, 42], [50], [50, 51])  # kept: the instruction and 40
    expected = [embed(model, [query]) for query in queries]
    embedfuse.patch(model, reuse_prefixes="stream")
    computed.clear()
    for query, vector in zip(queries, expected, strict=True):
        assert_close(embed(model, [query]), vector, **TIGHT)
    assert computed == [29, 29, 1, 2]


def test_batches(model, computed):
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
def test_a_change_of_the_weights_is_seen(model, change):
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


def test_training_is_seen(model):
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


def test_dropout_is_not_remembered(model, computed):
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


def test_replicas_are_not_remembered(model):
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


def test_moving_or_casting_forgets(model):
    """Back and forth, the weights may lie where they lay, with the version that they had."""
    embedfuse.patch(model, reuse_prefixes="stream")
    for query in texts([40], [41]):
        embed(model, [query])
    cache = model._embedfuse.prefixes
    assert len(cache.prefixes(cache.stamp)) == 1
    model.float()  # moves nothing
    assert len(cache.prefixes(cache.stamp)) == 1
    model.double().float()
    assert not cache.prefixes(cache.stamp)


def test_threads(model):
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


def test_layers_of_another_kind_are_not_remembered(model, computed):
    """What a LoRA layer does depends on more than its parameters."""

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


def test_angles_that_hang_on_the_batch_are_not_remembered():
    rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}
    make = partial(make_model, "llama", rope_parameters=rope, max_position_embeddings=28)
    model, other = make(), make()
    embedfuse.patch(other, reuse_prefixes="off")  # the original's own angles keep a history
    queries = texts([], [40], list(range(40, 70)))
    expected = [embed(other, [query]) for query in queries]
    embedfuse.patch(model, reuse_prefixes="stream")
    for query, vector in zip(queries, expected, strict=True):
        assert_close(embed(model, [query]), vector, **TIGHT)


def test_copies_start_anew(model, computed):
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


def fused_step(model):
    """Gradients by hand: no forward with gradients is seen, and no version counted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def read_into_the_same_buffer(model):
    weight = model.state_dict()["layers.0.self_attn.k_proj.weight"]
    memory = weight.numpy().copy()

    def load(factor):
        memory[:] *= factor
        changed = {"layers.0.self_attn.k_proj.weight": torch.from_numpy(memory)}
        model.load_state_dict({**model.state_dict(), **changed}, assign=True)

    load(1)
    return lambda model: load(-3)


def loose_weight(model):
    projection = model.layers[0].self_attn.k_proj
    weight = projection.weight.detach().clone()
    del projection.weight
    projection.weight = weight
    return lambda model: setattr(projection, "weight", weight * -3)


@pytest.mark.parametrize(
    "prepare",
    [lambda model: fused_step, read_into_the_same_buffer, loose_weight],
    ids=["fused step", "the same buffer", "loose weight"],
)
def test_weights_that_change_without_a_sign_of_it(model, prepare):
    queries = texts([40], [41], [42])
    embedfuse.patch(model, reuse_prefixes="stream")
    change = prepare(model)
    for query in queries[:2]:
        embed(model, [query])
    change(model)
    found = embed(model, [queries[2]])
    embedfuse.unpatch(model)
    assert_close(found, embed(model, [queries[2]]), **TIGHT)
