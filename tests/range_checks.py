"""Each op over the exponents of fp32, beside fp64; for any backend.

Inputs of logits are small multiples of powers of two: their products are exact, so that no rounding of logits
hides what exponentials, logarithms and divisions lose.
"""

import torch
from torch.testing import assert_close

from embedfuse.ops import (
    Matryoshka,
    add_layer_norm,
    add_rms_norm,
    info_nce,
    maxsim,
    pool_normalize,
    silu_mul,
    varlen_attention,
)
from embedfuse.ops.info_nce.statistics import statistics
from embedfuse.registry import use_backend

SCALES = [2.0**k for k in range(-126, 121, 26)]  # of logits: inverse temperatures
_EDGE = torch.arange(86, 91, 0.25)  # e^z stops being a number of fp32 in there
LOGITS = torch.cat((torch.arange(-400.0, 400, 8), _EDGE, -_EDGE))
EXPONENTS = range(-45, 39)  # of ten: subnormal numbers to the largest
SUBNORMAL = 1e-32  # what steps between subnormal numbers come to, divided by the least norm, 1e-12


def beside_fp64(function, *inputs, rtol=1e-5, atol=1e-6, gradients=True):
    """function's outputs, and the gradients of the sum of the first: here and by the reference in fp64."""
    here = _outputs(function, inputs, gradients)
    with use_backend("reference"):
        exact = _outputs(function, [x.double() for x in inputs], gradients)
    for got, wanted in zip(here, exact, strict=True):
        assert_close(got.double(), wanted.double(), rtol=rtol, atol=atol)


def _outputs(function, inputs, gradients: bool):
    leaves = [x.detach().clone().requires_grad_(gradients) for x in inputs]
    outputs = function(*leaves)
    of_leaves = torch.autograd.grad(outputs[0].sum(), leaves) if gradients else ()
    return [x.detach() for x in (*outputs, *of_leaves)]


def sixteenths(*shape, seed=0):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 16


def check_info_nce():
    # Rows (1, z / 128) against (1, 0), theirs, and (0, 1): logits 128 and z.
    q, pool = torch.stack((torch.ones(len(LOGITS)), LOGITS / 128), 1), torch.eye(2)
    labels = torch.zeros(len(LOGITS), dtype=torch.int64)
    beside_fp64(lambda *x: info_nce(*x, labels, temperature=1 / 128)[:2], q, pool, atol=1e-3)
    beside_fp64(lambda q: info_nce(q, pool.to(q), labels, temperature=1 / 128)[:2], q, atol=1e-3)
    q, pool, hard = sixteenths(5, 8), sixteenths(70, 8, seed=1), sixteenths(5, 2, 8, seed=2)
    for scale in SCALES:
        settings = {"temperature": 1 / scale, "hardness": scale}
        beside_fp64(lambda *x, s=settings: info_nce(*x, **s)[:1], q, pool, atol=1e-6 * scale)
        settings = {"temperature": 1 / scale, "matryoshka": Matryoshka((4, 8), normalize=False)}
        beside_fp64(
            lambda q, pool, hard, s=settings: info_nce(q, pool, hard_negatives=hard, **s)[:1],
            *(q, pool, hard),
            atol=1e-6 * scale,
        )


def check_sigmoid():
    def sums(x, y, scale=1.0):
        scale, bias = (torch.tensor(v, dtype=x.dtype) for v in (scale, 0.0))
        return statistics(x, y, scale, bias=bias, sigmoid=True)[1:2]

    beside_fp64(sums, LOGITS[:, None], torch.ones(1, 1), rtol=1e-5, atol=1e-3)
    for scale in SCALES:
        sides = sixteenths(5, 8), sixteenths(70, 8, seed=1)
        beside_fp64(lambda *x, s=scale: sums(*x, s), *sides, atol=1e-6 * scale)


def check_varlen_attention():
    query, key = sixteenths(9, 2, 16), sixteenths(70, 2, 16, seed=1)
    value = torch.randn(70, 2, 16, generator=torch.Generator().manual_seed(2))
    ends = [torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 9], [0, 66, 70])]
    for scale in SCALES:
        call = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "scale": scale}
        beside_fp64(
            lambda *x, call=call: [varlen_attention(*x, **call)], query, key, value, gradients=False
        )


def check_silu_mul():
    far = torch.tensor([sign * 10.0**k for k in EXPONENTS for sign in (1, -1)])
    gate = torch.cat((far, LOGITS / 4, torch.linspace(-89, -87, 400)))[:, None].repeat(1, 20)
    beside_fp64(
        lambda gate: [silu_mul(gate, torch.ones_like(gate))], gate, gradients=False, atol=1e-36
    )


def check_pool_normalize():
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    for k in EXPONENTS:
        x_k = x * 10.0**k
        # Sums of rows have to be fp32 themselves.
        for pooling in ("cls", "weighted_mean") if k < 38 else ("cls",):
            call = {"pooling": pooling}
            beside_fp64(
                lambda x, call=call: [pool_normalize(x, **call)],
                x_k,
                gradients=False,
                atol=SUBNORMAL,
            )
        if k > 18:
            assert_close(pool_normalize(x_k, pooling="cls").norm(dim=1), torch.ones(2))


def check_maxsim():
    q, d = (torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for k in (*range(-45, 17, 4), 17):  # products are those of the vectors as they come
        for sides in ((q * 10.0**k, d), (q, d * 10.0**k)):
            beside_fp64(
                lambda *x: [maxsim(*x, normalize=True)], *sides, gradients=False, atol=SUBNORMAL
            )


def check_norms():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(40)
    for k in range(-45, 18):  # squares are fp32, as the originals'
        call = x * 10.0**k, torch.zeros_like(x)
        beside_fp64(
            lambda x, r: [
                add_layer_norm(x, r, weight.to(x), torch.zeros_like(weight).to(x), 1e-12)
            ],
            *call,
            gradients=False,
            rtol=1e-4,
            atol=1e-5,
        )
        beside_fp64(
            lambda x: [add_rms_norm(x, None, weight.to(x))[1]], call[0], gradients=False, atol=1e-6
        )


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
