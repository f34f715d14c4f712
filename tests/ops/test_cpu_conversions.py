"""16-bit floats in the C++ kernels: every bit pattern in, every rounding case out, as torch does it.

A "cls" pooling without normalisation is a plain copy from one dtype to another.
"""

import pytest
import torch

import embedfuse
from embedfuse.ops import pool_normalize
from tests.isas import isas_of

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(params=isas_of("pool_normalize"))
def convert(request, use_isa):
    use_isa(request.param)

    def run(x, dtype):
        with embedfuse.use_backend("cpp"):
            rows = x.view(1, 1, -1)
            return pool_normalize(rows, pooling="cls", normalize=False, out_dtype=dtype)[0]

    return run


def every_value(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def assert_equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@HALVES
def test_widening_is_exact(convert, dtype):
    values = every_value(dtype)
    assert_equal(convert(values, torch.float32), values.float())
    # From the second value on, registers hold other lanes, and the last ones go the scalar way.
    assert_equal(convert(values[1:], torch.float32), values[1:].float())


@HALVES
def test_rounding_is_to_nearest_even(convert, dtype):
    values = every_value(dtype).float()
    values = values[values.isfinite()].unique()
    middle = ((values[1:].double() + values[:-1].double()) / 2).float()
    around = [middle, *(torch.nextafter(middle, torch.tensor(end)) for end in (-1e39, 1e39))]
    beyond = torch.tensor([65504.0, 65519.996, 65520.0, 1e30, 3.4e38, float("inf"), float("nan")])
    cases = torch.cat([values, *around, beyond, -beyond])
    assert_equal(convert(cases, dtype), cases.to(dtype))
