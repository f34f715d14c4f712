"""int8 documents: quantisation by hand, scores against fp64 of what was quantised, every instruction set."""

import dataclasses

import pytest
import torch

from embedfuse import config, testing
from embedfuse.ops import Int8, maxsim, maxsim_packed, maxsim_rerank, quantize_int8
from embedfuse.ops.maxsim.op import OP

NAN = float("nan")


def tensor(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)


def exact(q, d: Int8):
    """fp64 scores of all pairs."""
    rows = d.values.double() * d.scale.double()[..., None]
    return torch.einsum("aid,bjd->abij", q.double(), rows).amax(3).sum(2)


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_quantised_by_hand():
    x = torch.tensor(
        [[[127.0, 63.4, -1.5], [0.0, 0.0, 0.0]], [[-254.0, 3.0, 5.0], [1.0, 0.0, 0.25]]]
    )
    per_token = quantize_int8(x)
    assert per_token.scale.tolist() == [[1, 1], [2, torch.tensor(1 / 127).item()]]
    # 1.5 goes to the even 2, and so do 3 / 2 and 5 / 2.
    wanted = [[[127, 63, -2], [0, 0, 0]], [[-127, 2, 2], [127, 0, 32]]]
    assert per_token.values.tolist() == wanted
    per_document = quantize_int8(x.double(), per="document")
    assert per_document.scale.tolist() == [[1], [2]]
    assert per_document.values[1].tolist() == [[-127, 2, 2], [0, 0, 0]]
    assert quantize_int8(torch.tensor([[NAN, 1.0], [1e-44, 0.0]])).scale.isnan().tolist() == [
        True,
        False,
    ]
    for shape in ((0, 4), (3, 0), (2, 0, 4)):
        empty = quantize_int8(torch.ones(shape))
        assert (empty.values.shape, empty.scale.shape) == (shape, shape[:-1])


def test_arrays_are_quantised():
    x = tensor(5, 8)
    assert torch.equal(quantize_int8(x.numpy()).values, quantize_int8(x).values)


def test_scores_by_hand(backend):
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    d = Int8(torch.tensor([[[3, 0], [-1, 4]]], dtype=torch.int8), torch.tensor([[2.0, 0.5]]))
    # 3 * 2 against -1 * 0.5, and 0 against 4 * 0.5; negative scales turn the order round.
    assert maxsim(q, d).tolist() == [[6 + 2]]
    assert maxsim(q, dataclasses.replace(d, scale=-d.scale)).tolist() == [[0.5 + 0]]
    assert maxsim(q, dataclasses.replace(d, scale=torch.tensor([[3.0]]))).tolist() == [[9 + 12]]
    unit = maxsim(q, dataclasses.replace(d, scale=torch.tensor([[-5.0, 0.1]])), normalize=True)
    assert unit.item() == pytest.approx(-1 / 17**0.5 + 4 / 17**0.5, abs=1e-6)
    away = maxsim(-q, dataclasses.replace(d, scale=torch.tensor([[-5.0, 0.1]])), normalize=True)
    assert away.item() == pytest.approx(1 + 0, abs=1e-6)


@pytest.mark.parametrize("isa", config.CPU_ISAS)
@pytest.mark.parametrize("depth", [3, 64, 130, 1030])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_instruction_set(use_isa, isa, depth, dtype):
    use_isa(isa)
    for rows in (1, 33, 100):
        q = tensor(rows, depth, dtype=dtype)
        d = quantize_int8(tensor(1400, depth, seed=1))
        spans = torch.tensor([[0, 700], [700, 701], [701, 1400], [3, 90], [5, 5]])
        sides = q, torch.tensor([[0, rows]]), [d.values], spans, d.scale
        testing.assert_close_to_reference(OP, (*sides, None, None, False, 0), "cpp")


# Where many products lie close together none may be screened away, and the place is the first best one's.
@pytest.mark.parametrize("rows", [3, 100])
def test_close_products(backend, rows):
    q = tensor(rows, 96)
    base = torch.randint(-127, 128, (1, 96), generator=torch.Generator().manual_seed(2))
    values = base.repeat(600, 1)
    values[torch.arange(600), torch.arange(600) % 96] += torch.arange(600) % 3 - 1
    values = values.clamp(-127, 127).to(torch.int8)
    scale = torch.full((600,), 0.01)
    sides = q, torch.tensor([[0, rows]]), [values], torch.tensor([[0, 600]]), scale
    score, argmax = OP(*sides, None, None, False, rows)
    products = q.double() @ values.double().T
    torch.testing.assert_close(score[0].double(), products.amax(1).sum() * 0.01, rtol=1e-6, atol=0)
    chosen = products.gather(1, argmax[0].long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, products.amax(1), rtol=1e-6, atol=0)
    same = values[:1].repeat(600, 1)
    assert not OP(*sides[:2], [same], *sides[3:], None, None, False, rows)[1].any()


# A query that int8 cannot hold: one value hides the others' bits, which alone put the second document token
# before the first. The smallest query's squares are 0 in fp32.
def test_products_equal_up_to_rounding(cpu_module):
    """A query without an error of its own: what fp32 may round is all that the bound allows for."""
    depth = 8192
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(-127, 128, (241, depth), generator=generator)
        q, values = rows[:1], rows[1:]
        q[0, 0] = 127
        values[::10] = (
            q.sign() * values[::10].abs()
        )  # products near 3e7, more than fp32 holds exactly
        scale = torch.full((240,), 1e-3)
        scale[::10] = (1e5 / (values[::10].double() @ q[0].double())).float()
        values = values.to(torch.int8)
        together = maxsim(q[None].float(), Int8(values[None], scale[None]))
        alone = maxsim(q[None].float(), Int8(values[:, None], scale[:, None]))
        assert together.item() == alone.max().item()


@pytest.mark.parametrize("size", [1, 2.0**-66, 2.0**-96])
def test_query_finer_than_int8(backend, size):
    q = torch.full((1, 1, 64), 1e-4)
    q[..., 0] = 1
    d = torch.zeros(1, 300, 64, dtype=torch.int8)
    d[..., 0] = torch.arange(300) % 90
    d[0, 100, 0], d[0, 100, 1:] = 101, -127
    d[0, 200, 0], d[0, 200, 1:] = 100, 127
    got = maxsim(q * size, Int8(d, torch.ones(1, 300)))
    assert got.item() / size == pytest.approx(100 + 63 * 127e-4, rel=64 * 2**-24)


def test_lengths_of_tokens_differ(backend):
    # A few tokens are 10,000 times as long, so the bound says little of the others.
    scale = torch.full((1, 500), 1e-4)
    scale[0, 7::100] = 1
    q = tensor(1, 20, 128)
    q[0, ::2] *= 1e6
    d = Int8(quantize_int8(tensor(1, 500, 128, seed=1)).values, scale)
    torch.testing.assert_close(maxsim(q, d).double(), exact(q, d), rtol=1e-6, atol=0)
    d.values[0, 7::100] = -q[0, :5].sign().to(torch.int8)
    torch.testing.assert_close(maxsim(q, d).double(), exact(q, d), rtol=1e-6, atol=0)


def test_a_zero_token_in_the_query_leaves_all(backend):
    q = tensor(1, 5, 128)
    q[0, 2] = 0
    d = quantize_int8(tensor(2, 900, 128, seed=1))
    d = Int8(d.values, d.scale * torch.linspace(0.1, 1, 900))
    torch.testing.assert_close(maxsim(q, d).double(), exact(q, d), rtol=1e-6, atol=0)


def test_the_lowest_byte(backend):
    # -128 is no value of quantize_int8's, but a byte, whose square must not be lost from the bound.
    d = Int8(torch.zeros(1, 300, 64, dtype=torch.int8), torch.ones(1, 300))
    d.values[..., 0] = torch.arange(300) % 90
    d.values[0, 100, 1:32], d.values[0, 100, 32:63] = 127, -128
    d.values[0, 200, 1:32], d.values[0, 200, 32:] = -128, 127
    d.values[0, 100::100, 0] = torch.tensor([101, 100], dtype=torch.int8)
    q = torch.ones(1, 1, 64)
    q[..., 1:32], q[..., 32:] = -1e-4, 1e-4
    assert maxsim(q, d).item() == pytest.approx(100 + 1e-4 * (31 * 128 + 32 * 127), rel=64 * 2**-24)


def test_nan_and_infinity(backend):
    d = quantize_int8(tensor(3, 50, 40, seed=1))
    d.scale[1, 30] = NAN
    assert maxsim(tensor(2, 5, 40), d).isnan().tolist() == [[False, True, False]] * 2
    for bad in (NAN, float("inf")):
        q = tensor(2, 5, 40)
        q[1, 3, 2] = bad
        values = d.values.clone()
        values[..., 2] = 0
        got = maxsim(q, Int8(values, torch.full((3, 50), 0.01)))
        assert got.isnan().tolist() == [[False] * 3, [True] * 3]
    assert maxsim(tensor(1, 5, 40), quantize_int8(torch.full((1, 9, 40), NAN))).isnan().all()
    # Infinity first, infinity times 0 in a later chunk of the document.
    q, values = torch.tensor([[[float("inf"), 1]]]), torch.ones(1, 3000, 2, dtype=torch.int8)
    assert maxsim(q, Int8(values, torch.ones(1, 1))).isposinf().all()
    values[0, 2500, 0] = 0
    assert maxsim(q, Int8(values, torch.ones(1, 1))).isnan().all()


def test_a_document_of_several_chunks(backend):
    d = quantize_int8(tensor(1, 3000, 40, seed=1))
    q = tensor(1, 5, 40)
    torch.testing.assert_close(maxsim(q, d).double(), exact(q, d), rtol=1e-6, atol=0)
    # Found in two places of one chunk, and in a later chunk again.
    d.values[0, [20, 700, 2500]], d.scale[0, [20, 700, 2500]] = q[0, 0].sign().to(torch.int8), 9
    sides = q[0], torch.tensor([[0, 5]]), [d.values[0]], torch.tensor([[0, 3000]]), d.scale[0]
    rows = d.values[0].double() * d.scale[0, :, None].double()
    wanted = (q[0].double() @ rows.T).max(1).indices
    assert wanted[0] == 20
    assert wanted.max() > 1024
    assert OP(*sides, None, None, False, 5)[1].tolist() == [wanted.tolist()]
    d.scale[0, 3] = NAN
    assert maxsim(q, d).isnan().all()


def test_zeros(backend):
    zeros = quantize_int8(torch.zeros(2, 30, 16))
    assert maxsim(tensor(1, 5, 16), zeros).tolist() == [[0, 0]]
    assert maxsim(tensor(1, 5, 16), zeros, normalize=True).tolist() == [[0, 0]]
    q = tensor(1, 5, 16)
    q[0, 2:] = 0
    d = quantize_int8(tensor(2, 30, 16, seed=1))
    torch.testing.assert_close(maxsim(q, d).double(), exact(q, d), rtol=1e-6, atol=1e-7)
    tiny = Int8(d.values, d.scale * 1e-36)
    torch.testing.assert_close(maxsim(q, tiny).double() * 1e36, exact(q, d), rtol=1e-4, atol=1e-5)
    nothing = quantize_int8(tensor(0, 30, 16))
    assert maxsim(q, nothing).shape == (1, 0)
    assert maxsim(q, quantize_int8(tensor(2, 0, 16))).tolist() == [[0, 0]]
    assert maxsim(q[..., :0], quantize_int8(tensor(2, 3, 0))).tolist() == [[0, 0]]


@pytest.mark.parametrize("per", ["token", "document"])
def test_masks_and_packing(backend, per):
    lengths = [9, 300, 1, 0, 44]
    padded = quantize_int8(tensor(5, 300, 24, seed=1), per)
    mask = torch.arange(300) < torch.tensor(lengths)[:, None]
    q = tensor(3, 7, 24)
    scale = padded.scale.expand(5, 300)
    packed = Int8(padded.values[mask], scale[mask])
    wanted = {padding: torch.zeros(3, 5) for padding in ("exclude", "zero_vector")}
    for i, n in enumerate(lengths):
        if n:
            rows = padded.values[i, :n].double() * scale[i, :n, None].double()
            best = torch.einsum("aid,jd->aij", q.double(), rows).amax(2)
            wanted["exclude"][:, i] = best.sum(1)
            wanted["zero_vector"][:, i] = (best if n == 300 else best.clamp_min(0)).sum(1)
    for padding, scores in wanted.items():
        got = maxsim(q, padded, d_mask=mask, padding=padding)
        torch.testing.assert_close(got, scores, rtol=1e-5, atol=1e-6)
    holes = mask.clone()
    holes[1, 100:200] = False
    got = maxsim(q, padded, d_mask=holes)
    apart = Int8(padded.values[1:2, holes[1]], scale[1:2, holes[1]])
    torch.testing.assert_close(got[:, 1], exact(q, apart)[:, 0].float(), rtol=1e-5, atol=1e-6)
    args = q.flatten(0, 1), cu(7, 7, 7), packed, cu(*lengths)
    everything = maxsim_packed(*args)
    torch.testing.assert_close(everything, maxsim(q, padded, d_mask=mask), rtol=1e-5, atol=1e-5)
    pairs = torch.tensor([[2, 1], [0, 4], [1, 3]])
    got = maxsim_packed(*args, pairs)
    torch.testing.assert_close(got, everything[pairs[:, 0], pairs[:, 1]], rtol=1e-5, atol=1e-5)
    one_scale = Int8(packed.values, torch.tensor([0.5]))
    all_scales = Int8(packed.values, torch.full((len(packed.values),), 0.5))
    assert torch.equal(
        maxsim_packed(*args[:2], one_scale, args[3]), maxsim_packed(*args[:2], all_scales, args[3])
    )


def test_views_score_as_their_copies(backend):
    wide = quantize_int8(tensor(6, 10, 40))
    for cut in (
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[:1].expand(3, *[-1] * (x.dim() - 1)),
    ):
        view = Int8(cut(wide.values), cut(wide.scale))
        copy = Int8(view.values.clone(), view.scale.clone())
        q = tensor(2, 4, 40, seed=1)
        torch.testing.assert_close(maxsim(q, view), maxsim(q, copy), rtol=1e-5, atol=1e-5)
    columns = Int8(wide.values[..., 3:30], wide.scale)
    q = tensor(2, 4, 27, seed=1)
    torch.testing.assert_close(maxsim(q, columns).double(), exact(q, columns), rtol=1e-5, atol=1e-6)


def test_rerank(backend):
    documents = [tensor(n, 8, seed=n) for n in (5, 300, 1, 17)]
    query = tensor(6, 8)
    quantised = [
        quantize_int8(d, per) for d, per in zip(documents, ["token", "document"] * 2, strict=True)
    ]
    wanted = torch.stack(
        [exact(query[None], Int8(d.values[None], d.scale[None]))[0, 0] for d in quantised]
    )
    scores, order = maxsim_rerank(query, quantised)
    assert order.tolist() == wanted.argsort(descending=True).tolist()
    torch.testing.assert_close(
        scores.double(), wanted.sort(descending=True).values, rtol=1e-6, atol=1e-6
    )
    stacked = quantize_int8(tensor(4, 9, 8))
    assert maxsim_rerank(query, stacked, 1)[0] == maxsim(query[None], stacked).amax()


# Not the reference: torch's GEMM may round by its number of threads.
def test_same_bits_on_several_threads(cpu_module, restore_threads):
    q, d = tensor(20, 40, 96), quantize_int8(tensor(30, 70, 96, seed=1))
    mask = torch.arange(70) < torch.arange(5, 65, 2)[:, None]
    torch.set_num_threads(1)
    alone = maxsim(q, d, d_mask=mask)
    torch.set_num_threads(2)
    for _ in range(3):
        assert torch.equal(maxsim(q, d, d_mask=mask), alone)


def test_errors():
    q, d = tensor(2, 3, 4), quantize_int8(tensor(5, 6, 4))
    for name, call in {
        "values": lambda: Int8(d.values.int(), d.scale),
        "values: .*int8 of shape": lambda: Int8(d.values[0, 0], d.scale),
        r"scale: .*\(5, 4\)": lambda: Int8(d.values, d.scale[:, :4]),
        "scale: torch.float16": lambda: Int8(d.values, d.scale.half()),
        "scale: on meta": lambda: Int8(d.values, d.scale.to("meta")),
        "per='row'": lambda: quantize_int8(q, "row"),
        "x: torch.int64": lambda: quantize_int8(q.long()),
        "x: .*shape": lambda: quantize_int8(q[0, 0]),
        "q: torch.int64": lambda: maxsim(q.long(), d),
        r"d: shape \(5, 6, 4\)": lambda: maxsim(q[..., :3], d),
        "d: torch.int8": lambda: maxsim(q, d.values),
        "q: requires grad": lambda: maxsim(q.clone().requires_grad_(), d),
        r"documents\[1\]: Int8": lambda: maxsim_rerank(q[0], [q[1], quantize_int8(q[1])]),
        r"documents\[0\]: shape": lambda: maxsim_rerank(q[0], [quantize_int8(q[1, :, :3])]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
    with torch.no_grad():
        maxsim(q.clone().requires_grad_(), d)


# The longest whose products of bytes fit into 32 bits, and a longer one.
@pytest.mark.parametrize("depth", [32768, 32772])
def test_long_vectors_of_large_values(backend, depth):
    values = torch.full((1, 60, depth), 127, dtype=torch.int8)
    values[0, torch.arange(60), torch.arange(60) * 7] = 0
    values[0, 30:] = -127
    d = Int8(values, torch.ones(1, 60))
    q = torch.ones(2, 3, depth)
    q[1] = -1
    torch.testing.assert_close(maxsim(q, d).double(), exact(q, d), rtol=1e-5, atol=0)
