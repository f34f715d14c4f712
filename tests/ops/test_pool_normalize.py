"""Values worked out by hand, what is never read, errors, and agreement with sentence-transformers."""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from embedfuse import testing
from embedfuse.ops import pool_normalize
from embedfuse.ops.pool_normalize import OP, POOLINGS

NAN = float("nan")
# Two sequences, of three tokens and of one, and what each pooling makes of them.
TOKENS = [[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [5.0, -12.0]]
POOLED = {
    "cls": [[1, 0], [5, -12]],
    "last": [[3, 4], [5, -12]],
    "mean": [[4 / 3, 2], [5, -12]],
    "weighted_mean": [[10 / 6, 16 / 6], [5, -12]],
}
NORMS = {  # of the first sequence; that of the second is 13
    "cls": 1,
    "last": 5,
    "mean": (16 / 9 + 4) ** 0.5,
    "weighted_mean": (100 + 256) ** 0.5 / 6,
}


def rows_of(inputs: str) -> dict:
    """The two sequences as arguments of pool_normalize; padding is NaN."""
    t, n = TOKENS, [NAN, NAN]
    if inputs == "packed":
        cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
        return {"hidden_states": torch.tensor(t), "cu_seqlens": cu_seqlens}
    rows, mask = {
        "right padding": ([[*t[:3], n], [t[3], n, n, n]], [[1, 1, 1, 0], [1, 0, 0, 0]]),
        "left padding": ([[n, *t[:3]], [n, n, n, t[3]]], [[0, 1, 1, 1], [0, 0, 0, 1]]),
        "both": ([[n, *t[:3], n], [n, n, t[3], n, n]], [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]),
    }[inputs]
    return {"hidden_states": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("inputs", ["packed", "right padding", "left padding", "both"])
def test_values(backend, inputs, pooling):
    expected = torch.tensor(POOLED[pooling], dtype=torch.float32)
    got = pool_normalize(**rows_of(inputs), pooling=pooling, normalize=False)
    torch.testing.assert_close(got, expected)
    got = pool_normalize(**rows_of(inputs), pooling=pooling)
    torch.testing.assert_close(got, expected / torch.tensor([[NORMS[pooling]], [13.0]]))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("cls", [1, 0]), ("last", [3, 4]), ("mean", [2, 2]), ("weighted_mean", [10 / 4, 12 / 4])],
)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_hole_in_the_mask(backend, pooling, expected, mask_dtype):
    rows = torch.tensor([[[NAN, NAN], [1.0, 0.0], [NAN, NAN], [3.0, 4.0]]])
    mask = torch.tensor([[0, 1, 0, 1]]).to(mask_dtype)
    got = pool_normalize(rows, attention_mask=mask, pooling=pooling, normalize=False)
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float32))


def test_without_mask_every_row_is_a_token(backend):
    got = pool_normalize(torch.tensor([TOKENS]), normalize=False)
    torch.testing.assert_close(got, torch.tensor([[9 / 4, -6 / 4]]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_empty_sequences_are_zero(backend, pooling):
    cu_seqlens = torch.tensor([0, 0, 2, 2, 4, 4], dtype=torch.int32)
    got = pool_normalize(torch.tensor(TOKENS), cu_seqlens=cu_seqlens, pooling=pooling)
    assert torch.equal(got[::2], torch.zeros(3, 2))
    assert got[1::2].norm(dim=1).sub(1).abs().max() < 1e-6
    mask = torch.tensor([[0, 0, 0, 0]])
    got = pool_normalize(torch.full((1, 4, 2), NAN), attention_mask=mask, pooling=pooling)
    assert torch.equal(got, torch.zeros(1, 2))
    got = pool_normalize(torch.zeros(3, 0, 2), pooling=pooling)
    assert torch.equal(got, torch.zeros(3, 2))


def test_zero_and_tiny_vectors(backend):
    rows = torch.tensor([[[0.0, 0.0]], [[3e-14, 4e-14]], [[3e-11, 4e-11]]])
    expected = torch.tensor([[0.0, 0.0], [0.03, 0.04], [0.6, 0.8]])  # |p| < 1e-12: over 1e-12
    torch.testing.assert_close(pool_normalize(rows), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_nan_inside_the_mask_shows(backend, pooling, normalize):
    rows = torch.ones(2, 4, 20)
    rows[1] = NAN
    got = pool_normalize(rows, pooling=pooling, normalize=normalize)
    assert got[1].isnan().all()
    assert got[0].isfinite().all()


def test_no_columns_and_no_sequences(backend):
    assert pool_normalize(torch.ones(2, 3, 0)).shape == (2, 0)
    assert pool_normalize(torch.ones(0, 3, 5)).shape == (0, 5)
    none = torch.zeros(1, dtype=torch.int32)
    assert pool_normalize(torch.ones(0, 5), cu_seqlens=none).shape == (0, 5)


def test_non_contiguous_inputs(backend):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 33, 6, 50, generator=generator)
    mask = torch.rand(6, 66, generator=generator) > 0.3
    for rows in (wide[1].permute(1, 0, 2), wide[2].permute(1, 0, 2)[..., ::3]):
        for keep in (mask[:, ::2], mask.t()[:33].t()):
            got = pool_normalize(rows, attention_mask=keep, pooling="weighted_mean")
            copied = pool_normalize(
                rows.contiguous(), attention_mask=keep.contiguous(), pooling="weighted_mean"
            )
            torch.testing.assert_close(got, copied)
    ends = torch.tensor([0, 9, 5, 9, 33, 9], dtype=torch.int32)[::2]
    packed = wide[0, :, 0].t().contiguous().t()
    got = pool_normalize(packed, cu_seqlens=ends)
    copied = pool_normalize(packed.contiguous(), cu_seqlens=ends.contiguous())
    torch.testing.assert_close(got, copied)


@pytest.mark.parametrize("strides", [(2**31 + 64, 40, 1), (40, 2**31 + 64, 1)])
def test_offsets_past_31_bits(backend, strides):
    # 4 GiB of addresses; only the pages that the view touches become memory.
    rows = torch.empty(2**31 + 256, dtype=torch.float16).as_strided((2, 2, 40), strides)
    rows.copy_(torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(0)))
    got = pool_normalize(rows, pooling="weighted_mean")
    copied = pool_normalize(rows.clone().contiguous(), pooling="weighted_mean")
    torch.testing.assert_close(got, copied)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "lengths", [[8192], [1, 0, 300, 900, 0, 2, 77, 0]], ids=["one long", "ragged"]
)
def test_batches_large_enough_for_threads(cpp, dtype, pooling, lengths, restore_threads):
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(int(ends[-1]), 205, generator=generator).to(dtype)
    args = (x, ends, None, pooling, True, torch.float32)
    testing.assert_close_to_reference(OP, args, cpp)
    assert_thread_count_changes_no_bit(args)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = x.new_zeros(*mask.shape, 205)
    padded[mask] = x
    args = (padded, None, mask, pooling, False, dtype)
    testing.assert_close_to_reference(OP, args, cpp)


def assert_thread_count_changes_no_bit(args):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OP(*args)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_out_dtype(backend):
    rows = torch.tensor([TOKENS])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        got = pool_normalize(rows, pooling="last", out_dtype=dtype)
        torch.testing.assert_close(got, torch.tensor([[5 / 13, -12 / 13]]).to(dtype))


def test_fp64_is_summed_in_fp64():
    rows = torch.tensor([[[1.0], [2.0**-40]]], dtype=torch.float64)
    got = pool_normalize(rows, normalize=False)
    assert got.dtype == torch.float64
    assert got.item() == (1 + 2.0**-40) / 2


PACKED = torch.zeros(4, 2)
PADDED = torch.zeros(2, 3, 2)


def ends(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("error", "text", "args"),
    [
        (ValueError, "pooling='max'", {"hidden_states": PADDED, "pooling": "max"}),
        (TypeError, "hidden_states: torch.int64", {"hidden_states": PADDED.long()}),
        (TypeError, "out_dtype: torch.int8", {"hidden_states": PADDED, "out_dtype": torch.int8}),
        (TypeError, "out_dtype: float64", {"hidden_states": PADDED, "out_dtype": torch.float64}),
        (ValueError, r"hidden_states: shape \(4, 2\)", {"hidden_states": PACKED}),
        (
            ValueError,
            r"hidden_states: shape \(2, 3, 2\)",
            {"hidden_states": PADDED, "cu_seqlens": ends(0, 2)},
        ),
        (
            ValueError,
            r"attention_mask: shape \(3, 2\); accepted is \(2, 3\)",
            {"hidden_states": PADDED, "attention_mask": torch.ones(3, 2)},
        ),
        (
            ValueError,
            "attention_mask: not accepted together with cu_seqlens",
            {"hidden_states": PACKED, "cu_seqlens": ends(0, 4), "attention_mask": PACKED},
        ),
        (
            ValueError,
            "cu_seqlens: torch.int64",
            {"hidden_states": PACKED, "cu_seqlens": ends(0, 4, dtype=torch.int64)},
        ),
        (
            ValueError,
            r"cu_seqlens: torch.int32 of shape \(1, 2\)",
            {"hidden_states": PACKED, "cu_seqlens": ends(0, 4)[None]},
        ),
        (
            ValueError,
            r"cu_seqlens: torch.int32 of shape \(0,\)",
            {"hidden_states": PACKED, "cu_seqlens": ends()},
        ),
        (
            ValueError,
            "cu_seqlens: on meta; accepted is the device of hidden_states, cpu",
            {"hidden_states": PACKED, "cu_seqlens": ends(0, 4, device="meta")},
        ),
        (
            ValueError,
            "attention_mask: on meta; accepted is the device of hidden_states, cpu",
            {"hidden_states": PADDED, "attention_mask": torch.ones(2, 3, device="meta")},
        ),
        *(
            (
                ValueError,
                "cu_seqlens: must start at 0",
                {"hidden_states": PACKED, "cu_seqlens": bad},
            )
            for bad in (
                ends(1, 4),
                ends(0, 3),
                ends(0, 5),
                ends(0, 3, 2, 4),
                ends(0, 9, 4),
                ends(4),
            )
        ),
    ],
)
def test_errors_name_the_argument(backend, error, text, args):
    with pytest.raises(error, match=text):
        pool_normalize(**args)


MODES = {"cls": "cls", "last": "lasttoken", "mean": "mean", "weighted_mean": "weightedmean"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_sentence_transformers(backend, pooling, side):
    models = pytest.importorskip("sentence_transformers.models")
    counts_padding = Version(version("sentence-transformers")) < Version("6.2")
    if (pooling, side) == ("weighted_mean", "left") and counts_padding:
        pytest.skip("sentence-transformers before 6.2 counts positions from the padding on")
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 7, 12, 12, 30])
    x = torch.randn(len(lengths), 30, 96, generator=generator)
    mask = (torch.arange(30) < lengths[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    features = {"token_embeddings": x, "attention_mask": mask}
    module = torch.nn.Sequential(models.Pooling(96, MODES[pooling]), models.Normalize())
    expected = module(features)["sentence_embedding"]
    got = pool_normalize(x, attention_mask=mask, pooling=pooling)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
