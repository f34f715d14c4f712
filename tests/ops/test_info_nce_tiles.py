"""How products are added up over tiles."""

import pytest
import torch

from embedfuse.ops.info_nce import tiles


def old_addmm(first, a, b, out_dtype, out):
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and Half")


def new_addmm(first, a, b, out_dtype, out):
    return out.copy_(first + a.to(out_dtype) @ b.to(out_dtype))


@pytest.mark.parametrize(
    ("addmm", "inside"),
    [(old_addmm, False), (new_addmm, True), (lambda first, *_, **__: first, False)],
    ids=["wants 16 bits", "takes fp32", "adds nothing"],
)
def test_products_are_added_as_torch_can(monkeypatch, addmm, inside):
    """No GPU is needed to see which way is taken, and that both add."""
    a, b, out = torch.randn(3, 4).half(), torch.randn(4, 5).half(), torch.randn(3, 5)
    expected = out + a.float() @ b.float()
    products = []

    def mm(a, b, out_dtype):
        products.append(a)
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", mm)
    tiles.adds_inside.cache_clear()
    tiles.add_product(out, a, b)
    tiles.adds_inside.cache_clear()
    assert bool(products) != inside
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
