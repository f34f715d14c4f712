"""maxsim's tiles at sizes that fill a GPU: walking programs, packed queries, slices of the depth, int8."""

import pytest
import torch

from embedfuse.ops import maxsim, quantize_int8
from embedfuse.registry import use_backend

pytestmark = pytest.mark.gpu


def tensor(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)
    return x.to("cuda", dtype)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1000, 128), (128, 128, 128), (1, 1000, 1024), (33, 50, 200)])
def test_against_all_products(shape, dtype, int8):
    queries, documents, depth = shape
    q = tensor(queries, 32, depth, dtype=dtype, seed=0)
    d = tensor(documents, 300, depth, dtype=dtype, seed=1)
    exact = d
    if int8:
        d = quantize_int8(d)
        exact = d.values.float() * d.scale[..., None]
    wanted = torch.stack(
        [(x.double() @ exact.double().flatten(0, 1).T).view(32, -1, 300).amax(2).sum(0) for x in q]
    )
    with use_backend("triton"):
        got = maxsim(q, d)
        assert torch.equal(maxsim(q, d), got)
    # Products are exact in fp32; depth additions of unit vectors' products, 32 maxima.
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=32 * depth * 2.0**-24)
