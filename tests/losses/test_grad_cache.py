"""GradCache (arXiv 2101.06983) takes the losses as its loss_fn."""

import importlib
import sys

import pytest
import torch

from embedfuse.losses import InfoNCE
from embedfuse.ops import info_nce


@pytest.fixture
def grad_cache(monkeypatch):
    """The class. It imports itself as grad_cache; installed from PyPI (0.0.1) it is called gradcache."""
    try:
        return importlib.import_module("grad_cache").GradCache
    except ImportError:
        package = pytest.importorskip("gradcache")
    monkeypatch.setitem(sys.modules, "grad_cache", package)
    return importlib.import_module("gradcache.grad_cache").GradCache


def towers():
    torch.manual_seed(0)
    return [torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh()) for _ in range(2)]


def inputs(group=1):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 6, generator=generator) for n in (10, 10 * group)]


def gradients(models):
    return [p.grad for model in models for p in model.parameters()]


def in_groups(q, documents):
    """GradCache's own layout: of each query the positive, then its hard negatives."""
    positives = torch.arange(len(q)) * (len(documents) // len(q))
    return info_nce(q, documents, positives, temperature=0.3).loss.mean()


@pytest.mark.parametrize(("loss", "group"), [(InfoNCE(temperature=0.1), 1), (in_groups, 3)])
def test_as_loss_fn(loss, group, grad_cache):
    cached, whole = towers(), towers()
    found = grad_cache(cached, chunk_sizes=4, loss_fn=loss)(*inputs(group))
    wanted = loss(*(model(x) for model, x in zip(whole, inputs(group), strict=True)))
    wanted.backward()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=0)
    for got, want in zip(gradients(cached), gradients(whole), strict=True):
        largest = want.abs().max().item()  # a small sum has the rounding of its large terms
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * largest)
        assert largest > 1e-3


def test_hard_negatives_by_keyword(grad_cache):
    """What is given to the step goes on to the loss."""
    hard = torch.randn(10, 2, 9, generator=torch.Generator().manual_seed(2))
    loss = InfoNCE(temperature=0.1)
    found = grad_cache(towers(), 4, loss)(*inputs(), hard_negatives=hard)
    wanted = loss(*(model(x) for model, x in zip(towers(), inputs(), strict=True)), hard)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=0)
    assert found > grad_cache(towers(), 4, loss)(*inputs()) + 0.1
