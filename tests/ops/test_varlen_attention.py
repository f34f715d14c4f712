"""Values worked out by hand, the accuracy of exp, what must not leak between sequences, and errors."""

import math

import pytest
import torch

from embedfuse import testing
from embedfuse.ops import varlen_attention
from embedfuse.ops.varlen_attention import OP
from tests.isas import isas_of

NAN, INF = float("nan"), float("inf")


def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attend(query, key, value, lengths_q, lengths_k=None, scale=1.0, **kwargs):
    return varlen_attention(
        query,
        key,
        value,
        cu_seqlens_q=bounds(*lengths_q),
        cu_seqlens_k=bounds(*(lengths_k or lengths_q)),
        scale=scale,
        **kwargs,
    )


def heads(rows):
    """One head: (tokens, head_dim) nested lists as (tokens, 1, head_dim)."""
    return torch.tensor(rows, dtype=torch.float32)[:, None]


def random_args(lengths_q, lengths_k, shape, dtype=torch.float32, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(n), *shape, generator=generator).to(dtype)
        for n in (lengths_q, lengths_k, lengths_k)
    )
    return q, k, v, bounds(*lengths_q), bounds(*lengths_k), scale, False, None


def test_values_by_hand(backend):
    # Scores ln 3 and 0 after the scale: weights 3/4 and 1/4. The second sequence: equal weights.
    key = heads([[2 * math.log(3), 7], [0, 7], [5, 1], [5, -1], [5, 9]])
    value = heads([[4, 8], [0, 16], [3, 0], [6, 0], [0, 3]])
    query = heads([[1, 0], [-1, 0], [1, 0]])
    out = attend(query, key, value, [2, 1], [2, 3], scale=0.5)
    expected = heads([[3, 10], [1, 14], [3, 1]])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def test_heads_are_apart(backend):
    key = torch.tensor([[[0.0], [0.0]], [[0.0], [100.0]]])
    value = torch.tensor([[[1.0], [10.0]], [[3.0], [30.0]]])
    out = attend(torch.ones(1, 2, 1), key, value, [1], [2])
    assert out.tolist() == [[[2.0], [30.0]]]


def test_without_keys(backend):
    out = attend(
        torch.ones(3, 1, 5), torch.ones(2, 1, 5), torch.ones(2, 1, 5), [2, 1, 0], [0, 1, 1]
    )
    assert out[:2].eq(0).all()
    assert out[2].eq(1).all()


# One register of query rows, one block of them, and one block of keys, each one less and one more.
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 129, 1030])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_lengths(cpp, rows, dtype):
    args = random_args([rows, 3], [rows, 3], (2, 20), dtype)
    testing.assert_close_to_reference(OP, args, cpp)
    args = random_args([1, 2], [rows, 3], (2, 20), dtype)
    testing.assert_close_to_reference(OP, args, cpp)


@pytest.mark.parametrize("isa", isas_of("varlen_attention"))
@pytest.mark.parametrize("head_dim", [1, 3, 4, 5, 8, 15, 16, 17, 32, 63, 64, 80, 96, 128, 255, 256])
def test_head_dims(use_isa, isa, head_dim):
    use_isa(isa)
    args = random_args([21, 70], [21, 70], (2, head_dim), scale=head_dim**-0.5)
    testing.assert_close_to_reference(OP, args, "cpp")


@pytest.mark.parametrize("isa", isas_of("varlen_attention"))
def test_exp_is_accurate_to_rounding(use_isa, isa):
    """Two keys with scores 0 and x <= 0 and values 0 and 1: e^x / (1 + e^x)."""
    use_isa(isa)
    x = torch.cat([torch.linspace(-87.3, 0, 200_001), -torch.logspace(-8, 0, 1000)])
    out = attend(x[:, None, None], heads([[0], [1]]), heads([[0], [1]]), [len(x)], [2])[:, 0, 0]
    exact = x.double().sigmoid()
    error = (out.double() - exact).abs() / exact / 2**-23
    # One unit in the last place for exp, half of one each for the sum, its reciprocal and the product.
    assert error[x < -20].max() < 1  # there the sum is 1
    assert error.max() < 2.5
    beyond = torch.tensor([-87.6, -88.0, -89.0, -104.0, -1e4, -3e38, -INF])
    out = attend(beyond[:, None, None], heads([[0], [1]]), heads([[0], [1]]), [7], [2])[:6, 0, 0]
    assert (out.double() - beyond[:6].double().sigmoid()).abs().max() < 2e-38


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_running_maximum(kernel, order, size):
    """Scores of up to 300 over several key blocks: e^300 is no fp32 number."""
    key = torch.linspace(-1, 1, 200)[:, None, None] * size
    if order == "falling":
        key = key.flip(0)
    args = (
        torch.tensor([[[1.0]], [[-1.0]]]),
        key,
        key / size,
        bounds(2),
        bounds(200),
        1.0,
        False,
        None,
    )
    testing.assert_close_to_reference(OP, args, kernel)


def test_nan_stays_in_its_sequence(backend):
    q, k, v, *_ = random_args([3, 40, 70], [3, 40, 70], (2, 16))
    clean = attend(q, k, v, [3, 40, 70])
    for which in range(3):
        dirty = [t.clone() for t in (q, k, v)]
        dirty[which][42, 1, 15] = NAN
        out = attend(*dirty, [3, 40, 70])
        assert torch.equal(out[:3], clean[:3])
        assert torch.equal(out[43:], clean[43:])
        assert torch.equal(out[:, 0], clean[:, 0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_scores_that_are_no_numbers(backend, bad):
    """As softmax has it: NaN and inf make the row NaN, -inf leaves its key out."""
    q, k, v, *_ = random_args([2], [150], (1, 1))
    q = q.abs()
    k[3] = k[130] = bad
    out = attend(q, k, v, [2], [150])
    if bad == -INF:
        kept = [j for j in range(150) if j not in (3, 130)]
        torch.testing.assert_close(out, attend(q, k[kept], v[kept], [2], [148]))
    else:
        assert out.isnan().all()
    assert attend(q, k[3:4].expand(70, 1, 1), v[:70], [2], [70]).isnan().all()


def test_strided_inputs(backend):
    wide = torch.randn(30, 3, 4, 40, generator=torch.Generator().manual_seed(0))
    cases = [
        [wide[:, i, :, 5:21] for i in range(3)],
        [wide[:, i, ::2, ::2] for i in range(3)],
        [wide[:, i].permute(0, 2, 1) for i in range(3)],
        [wide[:1, 0].expand(30, 4, 40), wide[:, 1], wide[:, 2, :1].expand(30, 4, 40)],
    ]
    for inputs in cases:
        copies = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        out = attend(*inputs, [13, 17], scale=0.2)
        assert out.is_contiguous()
        torch.testing.assert_close(out, attend(*copies, [13, 17], scale=0.2), rtol=1e-6, atol=1e-6)


def test_offsets_past_31_bits(backend):
    # 8 GiB of addresses; only the pages that the view touches become memory.
    far = torch.empty(2**32 + 64, dtype=torch.float16).as_strided((3, 1, 8), (2**31, 8, 1))
    near = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    found, wanted = (attend(x, x, x, [1, 2]) for x in (far, near))
    torch.testing.assert_close(found, wanted)


def test_causal_by_hand(backend):
    """Equal scores: each row is the mean of the values that it sees."""
    value = heads([[1], [3], [8], [10], [30]])
    zeros = torch.zeros_like(value)
    found = attend(zeros, zeros, value, [3, 2], causal=True)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([1.0, 2, 4, 10, 20]))
    found = attend(zeros, zeros, value, [3, 2], causal=True, window=2)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([1.0, 2, 5.5, 10, 20]))
    found = attend(zeros, zeros, value, [3, 2], causal=True, window=1)
    assert torch.equal(found, value)


def test_the_last_query_row_has_the_position_of_the_last_key(backend):
    value = heads([[1], [3], [8], [10], [30]])
    zeros = torch.zeros_like(value)
    found = attend(zeros[:3], zeros, value, [2, 1], [3, 2], causal=True)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([2.0, 4, 20]))
    # Three rows at one key: the first two stand before it.
    found = attend(zeros[:3], zeros[:1], value[:1], [3], [1], causal=True)
    assert found[:, 0, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("more", [1, 33])
def test_rows_before_their_last_keys_with_three_heads_each(kernel, more):
    """Blocks of 64 rows end amid a token's heads; its own key is the first of a block of keys."""
    q, k, v, *rest = random_args([70], [70 + more], (3, 8))
    args = (q, k[:, :1], v[:, :1], *rest[:3], True, None)
    testing.assert_close_to_reference(OP, args, kernel)


def test_groups_of_heads_share_keys(backend):
    """Heads 0 and 1 read key head 0, heads 2 and 3 key head 1."""
    value = torch.tensor([[[1.0], [10.0]], [[3.0], [30.0]]])
    found = attend(torch.zeros(1, 4, 1), torch.zeros(2, 2, 1), value, [1], [2])
    assert found.flatten().tolist() == [2, 2, 20, 20]


@pytest.mark.parametrize("isa", isas_of("varlen_attention"))
@pytest.mark.parametrize("window", [None, 1, 2, 15, 64, 65, 100, 500])
@pytest.mark.parametrize(
    ("rows", "keys"), [(150, 150), (1, 150), (20, 150), (65, 64), (70, 3), (64, 128), (17, 17)]
)
def test_which_keys_rows_attend_to(use_isa, isa, rows, keys, window):
    use_isa(isa)
    q, k, v, *rest = random_args([rows, 3], [keys, 5], (6, 20))
    args = (q, k[:, ::3], v[:, ::3], *rest[:3], True, window)
    testing.assert_close_to_reference(OP, args, "cpp")


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_is_that_of_torch(backend, dtype):
    import torch.nn.functional as F

    q, k, v, *_ = random_args([90], [90], (4, 16), dtype)
    k, v = k[:, :2], v[:, :2]
    mask = torch.ones(90, 90, dtype=torch.bool).tril().triu(-29)
    exact = (x.double().transpose(0, 1) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3, enable_gqa=True)
    found = attend(q, k, v, [90], scale=0.3, causal=True, window=30)
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), expected.transpose(0, 1), rtol=0, atol=4 * tolerance)


def test_later_tokens_change_nothing(backend):
    """Bit for bit, for whole blocks of keys as for parts of one."""
    q, k, v, *_ = random_args([200], [200], (2, 16))
    before = attend(q, k, v, [200], causal=True)
    for t in (k, v):
        t[130:] = 1e4
    after = attend(q, k, v, [200], causal=True)
    assert torch.equal(after[:130], before[:130])
    assert not torch.equal(after[130:], before[130:])


X = torch.ones(3, 2, 8)
GOOD = {"query": X, "key": X, "value": X, "cu_seqlens_q": bounds(3), "cu_seqlens_k": bounds(3)}


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (r"query: shape \(3, 16\)", {"query": X.flatten(1)}),
        ("query: head_dim 257; accepted are 1 to 256", {"query": torch.ones(3, 2, 257)}),
        (r"key: shape \(3, 2, 7\); accepted is \(tokens_k, kv_heads, 8\)", {"key": X[..., :7]}),
        (r"value: shape \(3, 1, 8\)", {"value": X[:, :1]}),
        ("kv_heads a divisor of 2", {k: torch.ones(3, 3, 8) for k in ("key", "value")}),
        ("kv_heads a divisor of 2", dict.fromkeys(("key", "value"), X[:, :0])),
        ("window=2, causal=False; accepted is", {"window": 2}),
        ("window=0, causal=True; accepted is", {"window": 0, "causal": True}),
        (r"value: shape \(2, 2, 8\)", {"value": X[:2]}),
        ("value: torch.float16 on cpu", {"value": X.half()}),
        ("key: torch.float32 on meta", {"key": X.to("meta")}),
        ("cu_seqlens_q: torch.int64", {"cu_seqlens_q": bounds(3).long()}),
        (r"cu_seqlens_k: torch.int32 of shape \(\)", {"cu_seqlens_k": torch.tensor(3).int()}),
        ("cu_seqlens_k: on meta", {"cu_seqlens_k": bounds(3).to("meta")}),
        ("cu_seqlens_k: 2 sequences; .* 1$", {"cu_seqlens_k": bounds(1, 2)}),
        ("cu_seqlens_q: must start at 0", {"cu_seqlens_q": bounds(3) + 1}),
        ("cu_seqlens_q: must start at 0", {"cu_seqlens_q": bounds(4)}),
        (
            "cu_seqlens_k: must start at 0",
            {"cu_seqlens_q": bounds(1, 1, 1), "cu_seqlens_k": bounds(2, -1, 2)},
        ),
    ],
)
def test_errors_name_the_argument(backend, text, changes):
    with pytest.raises(ValueError, match=text):
        varlen_attention(**{**GOOD, **changes}, scale=1.0)


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_a_gradient_is_refused(backend, which):
    call = {**GOOD, which: X.clone().requires_grad_(), "scale": 1.0}
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        varlen_attention(**call)
    with torch.no_grad():
        assert varlen_attention(**call).eq(1).all()
