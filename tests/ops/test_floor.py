"""The floor for sums of tensor cores, which cut off instead of rounding: emulated, since none is here."""

import pytest
import torch

from embedfuse import testing


def by_tensor_cores(a, b, products: int):
    """a b^T; so many products are added exactly, and the sum is cut off after 24 bits."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for k in range(0, a.shape[1], products):
        mantissa, exponent = torch.frexp(total + a[:, k : k + products] @ b[:, k : k + products].T)
        total = torch.ldexp((mantissa * 2**24).trunc() / 2**24, exponent)
    return total.float()


@pytest.mark.parametrize("products", [8, 16], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("depth", [64, 1030, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_that_are_cut_off_are_within_it(dtype, depth, products):
    a = torch.rand(20, depth, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = a.double() @ a.double().T
    found = by_tensor_cores(a.double(), a.double(), products)
    floor = testing.floor_of(a, tensor_cores=True)
    testing.assert_as_good(found, exact.float(), exact, floor=floor)
    if depth == 4096:
        with pytest.raises(AssertionError, match="error"):
            testing.assert_as_good(found, exact.float(), exact)


def test_it_is_for_them_alone():
    a = torch.ones(2, 1024, dtype=torch.float16)
    assert testing.floor_of(a, True) == pytest.approx(2e-6 + 128 * 2**-24)
    for x, tensor_cores in ((a, False), (a.float(), True), (a.double(), True)):
        assert testing.floor_of(x, tensor_cores) == 2e-6
