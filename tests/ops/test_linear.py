"""Values against fp64, inputs as they lie in a model's memory, and errors."""

import pytest
import torch

from embedfuse import testing
from embedfuse.ops import linear
from embedfuse.ops.linear import OP


def tensor(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)


def test_values_by_hand(backend):
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 10.0, 100.0]])
    bias = torch.tensor([0.25, -1.0])
    assert linear(x, weight).tolist() == [[1, 320], [0, 40]]
    assert linear(x, weight, bias).tolist() == [[1.25, 319], [0.25, 39]]


# 1 to 24 rows: one tile or several; 1,001 columns: threads, and a last tile of one.
@pytest.mark.parametrize("rows", range(1, 25))
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_tile_height_on_several_threads(cpp, rows, dtype):
    args = (tensor(rows, 301, dtype=dtype), [tensor(1001, 301, dtype=dtype, seed=1)], [None])
    testing.assert_close_to_reference(OP, args, cpp)


# Above FEW_ROWS: one to three registers of rows in a block, whole and part blocks; an odd depth has no
# pairs of bf16.
@pytest.mark.parametrize("rows", [25, 31, 33, 48, 49, 97, 150])
@pytest.mark.parametrize("depth", [300, 301])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_blocks_of_rows_on_several_threads(cpp, rows, depth, dtype):
    args = (tensor(rows, depth, dtype=dtype), [tensor(1001, depth, dtype=dtype, seed=1)], [None])
    testing.assert_close_to_reference(OP, args, cpp)


@pytest.mark.parametrize("rows", [5, 30])
@pytest.mark.parametrize("depth", [0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 255, 256, 257, 512, 514])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_depths_around_a_register_and_a_stretch_of_sums(cpp, rows, depth, dtype):
    shapes = ((rows, depth), (9, depth), (4, depth))
    x, *weights = (tensor(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    args = (x, weights, [tensor(9, dtype=dtype, seed=4), None])
    testing.assert_close_to_reference(OP, args, cpp)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17, 33])
def test_columns_around_a_tile(cpp, columns):
    args = (tensor(30, 40), [tensor(columns, 40, seed=1)], [tensor(columns, seed=2)])
    testing.assert_close_to_reference(OP, args, cpp)


def test_rows_that_are_rearranged_in_several_passes(cpp):
    # 8,192 columns of x: about 130 rows at a time.
    args = (tensor(300, 8192), [tensor(20, 8192, seed=1)], [tensor(20, seed=2)])
    testing.assert_close_to_reference(OP, args, cpp)


# Few rows and many; one thread's columns end within a weight.
@pytest.mark.parametrize("rows", [3, 9, 40])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_several_weights_side_by_side(backend, rows, dtype):
    columns = (300, 1, 0, 701, 33)
    weights = [tensor(n, 70, dtype=dtype, seed=i) for i, n in enumerate(columns)]
    biases = [None if i == 3 else tensor(n, dtype=dtype, seed=9) for i, n in enumerate(columns)]
    x = tensor(rows, 70, dtype=dtype)
    testing.assert_close_to_reference(OP, (x, weights, biases), backend)
    parts = [linear(x, *part) for part in zip(weights, biases, strict=True)]
    assert torch.equal(linear(x, weights, biases), torch.cat(parts, 1))
    assert torch.equal(linear(x, weights), torch.cat([linear(x, w) for w in weights], 1))


def test_strided_inputs(backend):
    wide, tall = tensor(10, 96), tensor(60, 96)
    cases = [
        (tall[::2, 7:40], tensor(6, 33), tensor(12)[::2]),
        (tall.t(), tensor(30, 120)[:, ::2], None),
        (wide[:, 7:40], tensor(6, 33), tensor(12)[::2]),
        (wide[::3, ::2], tensor(48, 20).t(), tensor(20)[None].expand(2, 20)[1]),
        (wide[:4].t(), tensor(3, 8)[:, ::2], torch.ones(()).expand(3)),
        (tensor(96).expand(5, 96), tensor(7, 96), None),
    ]
    for x, weight, bias in cases:
        copies = [
            None if t is None else t.clone(memory_format=torch.contiguous_format)
            for t in (x, weight, bias)
        ]
        torch.testing.assert_close(linear(x, weight, bias), linear(*copies), rtol=1e-6, atol=1e-6)


def test_offsets_past_31_bits(backend):
    # 4 GiB of addresses; only the pages that the view touches become memory.
    x = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 40), (2**31, 1))
    x.copy_(tensor(2, 40))
    weight = tensor(6, 40, dtype=torch.float16, seed=1)
    torch.testing.assert_close(linear(x, weight), linear(x.clone(), weight))


def test_nan_and_infinity_stay_in_their_row(backend):
    for rows in (3, 40):
        x = torch.ones(rows, 20)
        x[1, 19], x[2, 0] = float("nan"), float("inf")
        got = linear(x, torch.ones(6, 20))
        assert got[0].eq(20).all()
        assert got[3:].eq(20).all()
        assert got[1].isnan().all()
        assert got[2].isposinf().all()


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (r"x: shape \(2, 3\), weight: shape \(4, 5\)", (torch.ones(2, 3), torch.ones(4, 5))),
        (r"x: shape \(1, 2, 3\)", (torch.ones(1, 2, 3), torch.ones(4, 3))),
        (r"weight: shape \(3,\)", (torch.ones(2, 3), torch.ones(3))),
        (
            r"bias: shape \(3,\); accepted is \(4,\)",
            (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)),
        ),
        ("weight: torch.float16 on cpu", (torch.ones(2, 3), torch.ones(4, 3).half())),
        ("bias: torch.bfloat16", (torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).bfloat16())),
        ("weight: torch.float32 on meta", (torch.ones(2, 3), torch.ones(4, 3, device="meta"))),
        (
            "bias: torch.float32 on meta",
            (torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, device="meta")),
        ),
        ("weight: 2 of them, bias: 1", (torch.ones(2, 3), [torch.ones(4, 3)] * 2, torch.ones(4))),
        ("weight: 0 of them, bias: 0", (torch.ones(2, 3), [])),
        (r"weight: shape \(4, 5\)", (torch.ones(2, 3), [torch.ones(4, 3), torch.ones(4, 5)])),
    ],
)
def test_errors_name_the_argument(backend, text, args):
    with pytest.raises(ValueError, match=text):
        linear(*args)


@pytest.mark.parametrize("which", range(3))
def test_a_gradient_is_refused(backend, which):
    args = [torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)]
    args[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        linear(*args)
    with torch.no_grad():
        assert linear(*args).eq(4).all()


@pytest.mark.parametrize("rows", [3, 30])
def test_gelu_keeps_its_digits_in_both_tails(cpp, rows):
    """Where z is far below 0, z (1 + erf) / 2 would have none left."""
    small = torch.logspace(-30, 0, 61)
    z = torch.cat((torch.arange(-13, 13, 0.03), small, -small, torch.tensor([-1e4, 0, 1e4])))
    wanted = z.double() * torch.erfc(-z.double() / 2**0.5) / 2
    found = linear(torch.ones(rows, 1), z[:, None], gelu=True)
    # The exponent z^2 / 2 is rounded to fp32.
    bound = (8 + z.double() ** 2) * 2**-24 * wanted.abs() + 1e-37
    assert ((found - wanted).abs() <= bound).all()
    ends = torch.tensor([float("inf"), float("nan"), float("-inf")])
    found = linear(torch.ones(rows, 1), ends[:, None], gelu=True)
    wanted = torch.tensor([float("inf"), float("nan"), float("nan")]).expand(rows, -1)
    torch.testing.assert_close(found, wanted, equal_nan=True)
