import pytest
import torch
from torch import nn
from torch.testing import assert_close

import embedfuse.nn.linear as subject
from embedfuse.nn.linear import linear, linears


def layers(bias=True, sizes=(6, 6, 4)):
    torch.manual_seed(0)
    return tuple(nn.Linear(8, n, bias=bias) for n in sizes)


class Kernel:
    """Replaces the op, and records how many rows and weights it is called with."""

    def __init__(self, monkeypatch):
        self.calls, self.op = [], subject.LINEAR
        monkeypatch.setattr(subject, "LINEAR", self)
        rows = {torch.float32: 5}
        monkeypatch.setattr(subject, "most_rows", lambda dtype: rows.get(dtype, 0))

    def __call__(self, x, weights, biases):
        self.calls.append((len(x), len(weights)))
        return self.op(x, weights, biases)

    def accelerates(self, x):
        return True


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [2, 50])
def test_several_at_once_give_each_ones_result(bias, rows):
    modules, x = layers(bias), torch.randn(rows, 8)
    places = [p.data_ptr() for m in modules for p in m.parameters()]
    with torch.no_grad():
        for found, module in zip(linears(modules, x, inference=True), modules, strict=True):
            assert_close(found, module(x))
    assert [p.data_ptr() for m in modules for p in m.parameters()] == places


def test_gradients_reach_each_parameter():
    modules = layers()
    sum(y.sum() for y in linears(modules, torch.ones(3, 8), inference=False)).backward()
    assert all(m.weight.grad.eq(3).all() and m.bias.grad.eq(3).all() for m in modules)


def test_a_linear_of_another_class_runs_as_it_is(monkeypatch):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    kernel = Kernel(monkeypatch)
    modules, x = (*layers(sizes=(6, 4)), Twice(8, 3)), torch.randn(2, 8)
    with torch.no_grad():
        found = linears(modules, x, inference=True)
        assert torch.equal(found[2], modules[2](x))
        assert_close(found[:2], tuple(m(x) for m in modules[:2]))
    assert kernel.calls == [(2, 1), (2, 1)]


def test_the_kernel_runs_where_it_is_faster(monkeypatch):
    kernel, modules = Kernel(monkeypatch), layers()
    with torch.no_grad():
        for rows in (1, 5, 6):
            linears(modules, torch.zeros(rows, 8), inference=True)
        linear(modules[0], torch.zeros(2, 8), inference=True)
        linear(modules[0], torch.zeros(1, 8), inference=False)
        linear(modules[0].double(), torch.zeros(1, 8).double(), inference=True)
        with pytest.raises(RuntimeError):  # torch's error for another dtype
            linears(modules, torch.zeros(1, 8), inference=True)
    assert kernel.calls == [(1, 3), (5, 3), (2, 1)]
