"""Public names of 0.1 that moved still work, and say what to use instead."""

import pickle
import sys

import pytest
import torch
from torch.testing import assert_close

from embedfuse import ops


def test_bias_gelu():
    x, bias = torch.randn(3, 5).double(), torch.randn(5).double()
    with pytest.warns(DeprecationWarning, match=r"ops\.bias_gelu .* use torch"):
        bias_gelu = ops.bias_gelu
    z = x + bias
    assert_close(bias_gelu(x, bias), z * (1 + (z / 2**0.5).erf()) / 2)
    assert_close(bias_gelu(x), torch.nn.functional.gelu(x))


def test_prefixes():
    q, pool = torch.randn(4, 8), torch.randn(9, 8)
    with pytest.warns(DeprecationWarning, match=r"ops\.Prefixes .* use ops\.Matryoshka"):
        widths = ops.Prefixes((4, 8))
    with pytest.warns(DeprecationWarning, match="prefixes .* matryoshka"):
        old = ops.info_nce(q, pool, prefixes=widths)
    new = ops.info_nce(q, pool, matryoshka=ops.Matryoshka((4, 8)))
    assert all(map(torch.equal, old, new))


def test_both_names_at_once():
    q, widths = torch.randn(4, 8), ops.Matryoshka((4, 8))
    with (
        pytest.warns(DeprecationWarning, match="prefixes"),
        pytest.raises(ValueError, match=r"^prefixes: "),
    ):
        ops.info_nce(q, q, matryoshka=widths, prefixes=widths)


def test_other_names():
    with pytest.raises(AttributeError, match="no attribute 'relu'"):
        ops.relu()


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("csr", "Csr", "Csr"),
        ("int8", "Int8", "Int8"),
        ("info_nce_inputs", "FalseNegatives", "FalseNegatives"),
        ("info_nce_inputs", "Rows", "Rows"),
        ("info_nce_ranks", "AllGather", "AllGather"),
        ("info_nce_ranks", "Ring", "Ring"),
        ("info_nce_prefixes", "Prefixes", "Matryoshka"),
    ],
)
def test_objects_that_were_pickled(module, old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, f"embedfuse.ops.{module}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"ops.{module} has moved to") as caught:
        found = pickle.loads(f"cembedfuse.ops.{module}\n{old}\n.".encode())
    assert found is getattr(ops, new)
    assert caught[0].filename == __file__
