"""Scores by hand, masks, layouts, empty texts, NaN, large offsets and errors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embedfuse import testing
from embedfuse.ops import maxsim, maxsim_packed, maxsim_rerank, quantize_int8
from embedfuse.ops.maxsim.op import OP
from embedfuse.ops.maxsim.spans import padded_spans

NAN = float("nan")
# Of sums over the same rows, which may lie elsewhere and round otherwise.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Products with QUERY's rows: DOCUMENTS[0] 3 -1 2 and 0 4 -2, DOCUMENTS[1] -5 -6 -1 and -2 -1 -3.
QUERY = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
DOCUMENTS = torch.tensor(
    [[[3.0, 0.0], [-1.0, 4.0], [2.0, -2.0]], [[-5.0, -2.0], [-6.0, -1.0], [-1.0, -3.0]]]
)


def tensor(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_values_by_hand(backend):
    assert maxsim(QUERY, DOCUMENTS).tolist() == [[3 + 4, -1 + -1]]
    assert maxsim(QUERY, DOCUMENTS, reduction="mean").tolist() == [[3.5, -1]]
    # Of lengths 5 and 1: rows 0.6 0.8 and 1 0, the query's 1 0 and 0 1.
    q, d = QUERY * 7, torch.tensor([[[3.0, 4.0], [0.5, 0.0]]])
    assert maxsim(q, d, normalize=True).item() == pytest.approx(1 + 0.8, abs=1e-6)
    zeros = torch.zeros(1, 2, 2)
    assert maxsim(q, zeros, normalize=True).item() == 0


def test_masks_by_hand(backend):
    d_mask = torch.tensor([[1, 0, 0], [0, 1, 0]])
    # First tokens alone: 3 and 0; middle one: -6 and -1.
    assert maxsim(QUERY, DOCUMENTS, d_mask=d_mask).tolist() == [[3, -7]]
    assert maxsim(QUERY, DOCUMENTS, d_mask=d_mask, padding="zero_vector").tolist() == [[3, 0]]
    # Nothing is left out, so there is no zero vector.
    whole = torch.ones(2, 3)
    assert maxsim(QUERY, DOCUMENTS, d_mask=whole, padding="zero_vector").tolist() == [[7, -2]]
    q_mask = torch.tensor([[False, True]])
    assert maxsim(QUERY, DOCUMENTS, q_mask, reduction="mean").tolist() == [[4, -1]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32], ids=str)
def test_padding_is_never_read(backend, dtype):
    d = tensor(4, 6, 8)
    keep = torch.tensor(
        [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]]
    )
    q, q_keep = tensor(3, 5, 8, seed=1), torch.tensor([[1] * 5, [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    wanted = torch.stack(
        [
            torch.stack(
                [(a[m == 1] @ b[n == 1].T).amax(1).sum() for b, n in zip(d, keep, strict=True)]
            )
            for a, m in zip(q, q_keep, strict=True)
        ]
    )
    d[keep == 0], q[q_keep == 0] = NAN, NAN
    # Two documents whose tokens stand side by side: no copy; all four: one has a hole.
    for documents in ([0, 1, 3], [0, 1, 2, 3]):
        got = maxsim(q, d[documents], q_keep.to(dtype), keep[documents].to(dtype))
        torch.testing.assert_close(got, wanted[:, documents], rtol=1e-5, atol=1e-6)


def test_layouts_that_need_no_copy():
    x = tensor(4, 9, 16)
    mask = torch.arange(9) < torch.tensor([[9], [3], [0], [5]])
    for view, keep in ((x, None), (x, mask), (x, mask.flip(1)), (x[:, 1:], mask[:, 1:])):
        rows, spans, *_ = padded_spans("d", view, keep)
        assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        for i, (start, end) in enumerate(spans.tolist()):
            wanted = view[i] if keep is None else view[i][keep[i]]
            assert torch.equal(rows[start:end], wanted)


def test_views_score_as_their_copies(backend):
    wide = tensor(6, 10, 40)
    for view in (
        wide[:, 1:],
        wide[::2, :, 3:30],
        wide[..., ::2],
        wide.transpose(0, 1),
        wide[:1].expand(3, -1, -1),
        wide[:, :1, :1].expand(-1, 9, -1),
    ):
        q = tensor(2, 4, view.shape[2], seed=1)
        torch.testing.assert_close(maxsim(q, view), maxsim(q, view.clone()))
        torch.testing.assert_close(maxsim(view, q), maxsim(view.clone(), q))


def test_empty_texts(backend):
    q, d = tensor(3, 4), tensor(5, 4, seed=1)
    scores = maxsim_packed(q, cu(0, 3, 0), d, cu(0, 5, 0), reduction="mean")
    wanted = torch.zeros(3, 3)
    wanted[1, 1] = (q @ d.T).amax(1).mean()
    torch.testing.assert_close(scores, wanted)
    nothing = torch.zeros(1, 5)
    for padding in ("exclude", "zero_vector"):
        assert maxsim(q[None], d[None], d_mask=nothing, padding=padding).tolist() == [[0]]
    assert maxsim(q[None], d[None], nothing[:, :3]).tolist() == [[0]]
    assert maxsim(q[None], d[None, :0]).tolist() == [[0]]
    assert maxsim(q[None, :0], d[None], reduction="mean").tolist() == [[0]]
    assert maxsim(q[None][:0], d[None]).shape == (0, 1)
    assert maxsim(q[None], d[None][:0]).shape == (1, 0)
    assert maxsim(q[None, :, :0], d[None, :, :0]).tolist() == [[0]]


def test_packed_is_padded(backend):
    q_lengths, d_lengths = [4, 1, 33], [7, 20, 2, 300]
    q, d = tensor(sum(q_lengths), 24), tensor(sum(d_lengths), 24, seed=1)
    padded = [
        torch.nn.utils.rnn.pad_sequence(x.split(n), batch_first=True)
        for x, n in ((q, q_lengths), (d, d_lengths))
    ]
    masks = [torch.arange(max(n)) < torch.tensor(n)[:, None] for n in (q_lengths, d_lengths)]
    packed = (q, cu(*q_lengths), d, cu(*d_lengths))
    for settings in ({}, {"normalize": True, "reduction": "mean"}):
        wanted = maxsim(*padded, *masks, **settings)
        torch.testing.assert_close(maxsim_packed(*packed, **settings), wanted, **CLOSE)
        pairs = torch.tensor([[2, 3], [0, 0], [2, 1], [2, 1], [1, 2]])
        got = maxsim_packed(*packed, pairs, **settings)
        torch.testing.assert_close(got, wanted[pairs[:, 0], pairs[:, 1]], **CLOSE)
        assert maxsim_packed(*packed, pairs[:0], **settings).shape == (0,)


# Whole and part blocks of query rows; documents of several chunks; an odd depth has no pairs of bf16.
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 32, 33, 48, 49, 100])
@pytest.mark.parametrize("depth", [64, 65])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_query_lengths_on_several_threads(cpp, rows, depth, dtype):
    q, d = tensor(rows, depth, dtype=dtype), tensor(2200, depth, dtype=dtype, seed=1)
    spans = torch.tensor([[0, 700], [700, 701], [701, 2200], [3, 90]])
    args = (q, torch.tensor([[0, rows]]), [d], spans, None, None, None, False, rows)
    testing.assert_close_to_reference(OP, args, cpp)


def test_more_queries_than_a_group_on_threads(backend):
    q, d = tensor(150, 10, 128), tensor(2, 30, 128, seed=1)
    wanted = torch.einsum("aid,bjd->abij", q, d).amax(3).sum(2)
    torch.testing.assert_close(maxsim(q, d), wanted, rtol=1e-5, atol=1e-5)


def test_nan_products(backend):
    d = DOCUMENTS.clone()
    d[0, 1, 0] = NAN
    scores = maxsim(QUERY, d)
    assert scores.isnan().tolist() == [[True, False]]
    q = QUERY.clone()
    q[0, 0] = NAN
    assert maxsim(q, DOCUMENTS).isnan().all()
    assert (
        maxsim(q, DOCUMENTS, d_mask=torch.tensor([[1, 0, 0]] * 2), padding="zero_vector")
        .isnan()
        .all()
    )
    sides = d[0], torch.tensor([[0, 3]]), [QUERY[0]], torch.tensor([[0, 2]])
    assert OP(*sides, None, None, None, False, 3)[1].tolist() == [[0, 0, 0]]


def test_infinite_products(backend):
    d = torch.tensor(
        [[[-float("inf"), 0.0], [-float("inf"), 0.0]], [[1.0, float("inf")], [2.0, 5.0]]]
    )
    q = torch.tensor([[[1.0, 1.0]]])
    assert maxsim(q, d).tolist() == [[-float("inf"), float("inf")]]


def test_rerank(backend):
    documents = [tensor(n, 8, seed=n) for n in (5, 300, 1, 17)] + [torch.zeros(0, 8)]
    query = tensor(6, 8)
    wanted = torch.stack([(query @ d.T).amax(1).sum() for d in documents[:4]] + [torch.tensor(0.0)])
    scores, indices = maxsim_rerank(query, documents, 3)
    torch.testing.assert_close(scores, wanted.sort(descending=True).values[:3])
    assert indices.tolist() == wanted.argsort(descending=True)[:3].tolist()
    arrays = maxsim_rerank(query.numpy(), [d.numpy() for d in documents])
    assert arrays[1].tolist() == wanted.argsort(descending=True).tolist()
    equal = maxsim_rerank(query, tensor(1, 9, 8).expand(4, -1, -1), 2)
    assert equal[1].tolist() == [0, 1]
    assert maxsim_rerank(query, [])[1].tolist() == []


def test_rerank_of_views_and_its_gradient(backend):
    wide, query = tensor(9, 30, 20), tensor(6, 8)
    documents = [wide[0, :, :8], wide[1, ::2, 3:11], wide[2, :1, 5:13].expand(4, 8)]
    wanted = torch.stack([(query @ d.T).amax(1).sum() for d in documents])
    scores, order = maxsim_rerank(query, documents)
    torch.testing.assert_close(scores, wanted.sort(descending=True).values)
    assert order.tolist() == wanted.argsort(descending=True).tolist()
    leaves = [d.clone().requires_grad_() for d in documents[:2]]
    maxsim_rerank(query, leaves)[0].sum().backward()
    for d in leaves:
        plain = d.detach().clone().requires_grad_()
        (query @ plain.T).amax(1).sum().backward()
        torch.testing.assert_close(d.grad, plain.grad)


def test_offsets_past_31_bits(kernel):
    # 4 GiB of addresses; only the pages that the spans touch become memory.
    x = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 40), (2**31, 1))
    x.copy_(tensor(2, 40, dtype=torch.float16))
    spans = torch.tensor([[1, 2]])
    q = tensor(3, 40, dtype=torch.float16, seed=1)
    args = (q, torch.tensor([[0, 3]]), [x], spans, None, None, None, True, 3)
    testing.assert_close_to_reference(OP, args, kernel)


# Not the reference: torch's GEMM may round by its number of threads.
def test_same_bits_on_several_threads(cpu_module, restore_threads):
    q, d = tensor(20, 40, 96), tensor(30, 70, 96, seed=1)
    mask = torch.arange(70) < torch.arange(5, 65, 2)[:, None]
    torch.set_num_threads(1)
    alone = maxsim(q, d, d_mask=mask, normalize=True)
    torch.set_num_threads(2)
    for _ in range(3):
        assert torch.equal(maxsim(q, d, d_mask=mask, normalize=True), alone)


def test_lists_of_texts(backend):
    q, d = tensor(9, 12), tensor(31, 12, seed=1)
    queries, documents = list(q.split([4, 0, 5])), list(d.split([7, 1, 20, 3]))
    wanted = maxsim_packed(q, cu(4, 0, 5), d, cu(7, 1, 20, 3))
    torch.testing.assert_close(maxsim(queries, documents), wanted, **CLOSE)
    arrays = [x.numpy() for x in documents]
    found = maxsim(tuple(queries), arrays, padding="zero_vector")
    torch.testing.assert_close(found, wanted, **CLOSE)
    mean = maxsim(queries, documents, reduction="mean", normalize=True)
    packed = q, cu(4, 0, 5), d, cu(7, 1, 20, 3)
    torch.testing.assert_close(mean, maxsim_packed(*packed, reduction="mean", normalize=True))
    stacked = d[:28].view(4, 7, 12)
    for one, other in (
        ((queries, stacked), (queries, list(stacked))),
        ((stacked.numpy(), documents), (list(stacked), documents)),
    ):
        torch.testing.assert_close(maxsim(*one), maxsim(*other), **CLOSE)
    assert maxsim(queries, []).shape == (3, 0)
    eight = [quantize_int8(x) for x in documents]
    wanted = maxsim_packed(q, cu(4, 0, 5), quantize_int8(d), cu(7, 1, 20, 3))
    torch.testing.assert_close(maxsim(queries, eight), wanted, **CLOSE)


def test_gradient_of_lists(backend):
    def leaves():
        return [x.clone().requires_grad_() for x in (tensor(9, 12), tensor(31, 12, seed=1))]

    q, d = leaves()
    maxsim(q.split([4, 5]), d.split([7, 4, 20])).square().sum().backward()
    q_packed, d_packed = leaves()
    scores = maxsim_packed(q_packed, cu(4, 5), d_packed, cu(7, 4, 20))
    scores.square().sum().backward()
    torch.testing.assert_close(q.grad, q_packed.grad, **CLOSE)
    torch.testing.assert_close(d.grad, d_packed.grad, **CLOSE)


class Launches(TorchDispatchMode):
    """The ops that compute; views are none."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if all(r.alias_info is None for r in function._schema.returns):
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **kwargs or {})


def test_whole_texts_need_two_launches_before_the_kernel():
    """On a GPU each takes about as long as a small call."""
    q, d = tensor(2, 4, 16), tensor(3, 9, 16, seed=1)
    int8, packed = quantize_int8(d), (q.flatten(0, 1), cu(4, 4), d.flatten(0, 1), cu(9, 9, 9))
    for call in (lambda: maxsim(q, d), lambda: maxsim(q, int8)):
        with Launches() as launches:
            call()
        assert launches.names == ["arange", "arange", "maxsim"]
    with Launches() as launches:
        maxsim_packed(*packed)
    assert launches.names.count("_to_copy") == 2
    assert not {"stack", "cat", "clone", "zeros"} & set(launches.names)


@pytest.mark.parametrize("of", ["queries", "documents"])
def test_only_the_gradient_to_documents_sorts(of):
    q, d = tensor(2, 4, 16), tensor(3, 9, 16, seed=1)
    scores = maxsim(q.requires_grad_(of == "queries"), d.requires_grad_(of == "documents"))
    with Launches() as launches:
        scores.sum().backward()
    assert launches.names.count("sort") == (of == "documents")


def test_no_default_device_moves_the_texts():
    q, d = tensor(2, 3, 8), tensor(3, 4, 8, seed=1)
    wanted = maxsim(q, d)
    with torch.device("meta"):
        for documents in (d, list(d), quantize_int8(d)):
            assert maxsim(q, documents).device.type == "cpu"
        assert torch.equal(maxsim(q, d), wanted)
        assert maxsim(q, d, pairs=torch.tensor([[1, 2]], device="cpu")).item() == wanted[1, 2]


def test_batched_gradients():
    q, d = tensor(2, 3, 8).requires_grad_(), tensor(3, 4, 8, seed=1).requires_grad_()
    grads = tensor(5, 2, 3, seed=2)
    scores = maxsim(q, d)
    found = torch.autograd.grad(scores, (q, d), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for x, y in zip(
            found, torch.autograd.grad(scores, (q, d), grad, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(x[i], y)
