import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from embedfuse.nn.linear import FusedLinear, joined, linear


def layers(bias=True, sizes=(6, 6, 4)):
    torch.manual_seed(0)
    return tuple(nn.Linear(8, n, bias=bias) for n in sizes)


def storages(linears) -> int:
    return len({m.weight.untyped_storage().data_ptr() for m in linears})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [2, 50])
def test_one_gemm_gives_the_layers_results(bias, rows):
    linears = layers(bias)
    x = torch.randn(rows, 8)
    expected = [m(x) for m in linears]
    before = [copy.deepcopy(m.state_dict()) for m in linears]
    fused = FusedLinear(linears)
    assert fused.fuse()
    assert storages(linears) == 1
    for module, state in zip(linears, before, strict=True):
        assert all(torch.equal(module.state_dict()[k], v) for k, v in state.items())
    with torch.no_grad():
        for found, value in zip(fused(x, plain=True), expected, strict=True):
            assert_close(found, value)
    fused.part()
    assert storages(linears) == 3


def test_a_second_fuse_moves_nothing():
    linears = layers()
    fused = FusedLinear(linears)
    fused.fuse()
    places = [m.weight.data_ptr() for m in linears]
    assert fused.fuse()
    assert [m.weight.data_ptr() for m in linears] == places


def test_gradients_reach_each_parameter():
    linears = layers()
    fused = FusedLinear(linears)
    fused.fuse()
    sum(y.sum() for y in fused(torch.ones(3, 8), plain=False)).backward()
    assert all(m.weight.grad.eq(3).all() and m.bias.grad.eq(3).all() for m in linears)


def test_neighbours_in_memory_of_other_storages_are_not_joined():
    block = torch.zeros(4, 8)
    a, b = nn.Parameter(block[:2]), nn.Parameter(block[2:])
    assert joined([a, b]).shape == (4, 8)
    b.data = b.data.clone()
    assert joined([a, b]) is None
    assert joined([b, a]) is None


@pytest.mark.parametrize("change", ["subclass", "dtype", "width", "mixed bias", "shared"])
def test_what_cannot_be_joined_is_left_alone(change):
    linears = list(layers())
    if change == "subclass":
        linears[1].__class__ = type("Quantised", (nn.Linear,), {})
    elif change == "dtype":
        linears[1].half()
    elif change == "width":
        linears[1] = nn.Linear(9, 6)
    elif change == "mixed bias":
        linears[1] = nn.Linear(8, 6, bias=False)
    else:
        linears[1].share_memory()
    places = [m.weight.data_ptr() for m in linears]
    assert not FusedLinear(tuple(linears)).fuse()
    assert [m.weight.data_ptr() for m in linears] == places


def test_a_linear_of_another_class_runs_as_it_is():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = Twice(8, 3)
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(linear(module, x, plain=True), module(x))


def test_the_kernel_runs_where_it_is_faster(monkeypatch):
    import embedfuse.nn.linear as subject

    calls = []

    class Kernel:
        def __call__(self, x, weight, bias):
            calls.append(x.shape)
            return x

        def accelerates(self, x):
            return True

    monkeypatch.setattr(subject, "LINEAR", Kernel())
    monkeypatch.setattr(subject, "most_rows", lambda dtype: 5 if dtype == torch.float32 else 0)
    module = nn.Linear(8, 8)
    with torch.no_grad():
        for rows in (1, 5, 6):
            linear(module, torch.zeros(rows, 8), plain=True)
        linear(module, torch.zeros(1, 8), plain=False)
        linear(module.double(), torch.zeros(1, 8).double(), plain=True)
    assert calls == [(1, 8), (5, 8)]
