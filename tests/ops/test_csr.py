"""Rows of a Csr: choosing, joining, spreading out, and the form that FlagEmbedding gives."""

import pytest
import torch

from embedfuse import native
from embedfuse.ops import Csr

# {2: 0.5, 7: 1.5}, {}, {0: 3}, {7: 2, 8: 4, 300: 0.25}
CSR = Csr(
    torch.tensor([0, 2, 2, 3, 6]),
    torch.tensor([2, 7, 0, 7, 8, 300]),
    torch.tensor([0.5, 1.5, 3.0, 2.0, 4.0, 0.25]),
)
DICTS = [{"2": 0.5, "7": 1.5}, {}, {"0": 3.0}, {"7": 2.0, "8": 4.0, "300": 0.25}]


@pytest.fixture(params=["cpp", "plain Python"])
def built(request, monkeypatch):
    """Both builders of dicts."""
    if request.param == "cpp":
        return request.getfixturevalue("cpu_module")

    def missing():
        raise native.Unavailable("left out")

    monkeypatch.setattr(native, "cpu", missing)


def test_dicts(built):
    assert len(CSR) == 4
    assert CSR.dicts() == DICTS
    assert list(CSR.dicts()[3]) == ["7", "8", "300"]
    entry = CSR.dicts()[0].popitem()
    assert tuple(map(type, entry)) == (str, float)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert Csr(torch.zeros(1, dtype=torch.int64), nothing, torch.zeros(0)).dicts() == []
    assert Csr(torch.zeros(3, dtype=torch.int64), nothing, torch.zeros(0)).dicts() == [{}, {}]


def test_dicts_of_a_large_vocabulary(built):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(250_002, generator=generator)[:3000].view(3, -1).sort().values
    weights = torch.rand(3, 1000, generator=generator)
    got = Csr(torch.arange(4) * 1000, ids.flatten(), weights.flatten()).dicts()
    for row, i, w in zip(got, ids.tolist(), weights.tolist(), strict=True):
        assert row == dict(zip(map(str, i), w, strict=True))


def test_impossible_rows_raise(cpu_module):
    for indptr, ids in (([0, 7], [1, 2]), ([0, 2, 1, 2], [1, 2]), ([0, 2], [-1, 2])):
        with pytest.raises(ValueError, match="indptr must rise"):
            Csr(torch.tensor(indptr), torch.tensor(ids), torch.ones(2)).dicts()


def test_dicts_of_half_and_of_weights_with_gradient(built):
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], requires_grad=True)
    for dtype in (torch.float16, torch.bfloat16):
        got = Csr(CSR.indptr, CSR.token_ids, weights.to(dtype)).dicts()
        assert got[3] == {
            "7": weights[3].to(dtype).item(),
            "8": 0.5,
            "300": weights[5].to(dtype).item(),
        }


@pytest.mark.parametrize(
    "rows",
    [[3, 0, 3, 1], [], [-1, 2], torch.tensor([2, 3]), slice(1, 3), slice(None, None, 2)],
    ids=str,
)
def test_rows(rows):
    got = CSR[rows]
    wanted = DICTS[rows] if isinstance(rows, slice) else [DICTS[int(row)] for row in rows]
    assert got.dicts() == wanted
    assert len(got) == len(wanted)
    assert got.indptr.dtype == torch.int64


def test_rows_by_mask():
    assert CSR[torch.tensor([True, False, False, True])].dicts() == [DICTS[0], DICTS[3]]


def test_one_row_is_asked_for_as_a_list():
    with pytest.raises(TypeError, match="rows: 2; accepted are a list"):
        CSR[2]


def test_as_many_weights_as_ids():
    with pytest.raises(ValueError, match=r"weights: shape \(5,\); .* here \(6,\)"):
        Csr(CSR.indptr, CSR.token_ids, CSR.weights[:5])


def test_cat():
    assert Csr.cat([CSR[[3]], CSR[[]], CSR]).dicts() == [DICTS[3], *DICTS]
    assert Csr.cat([CSR]).dicts() == DICTS
    with pytest.raises(ValueError, match="parts: none"):
        Csr.cat([])


def test_dense():
    expected = torch.zeros(4, 301)
    expected[0, 2], expected[0, 7], expected[2, 0] = 0.5, 1.5, 3
    expected[3, 7], expected[3, 8], expected[3, 300] = 2, 4, 0.25
    assert torch.equal(CSR.dense(301), expected)
    with pytest.raises(IndexError):
        CSR.dense(300)


def test_gradients():
    weights = CSR.weights.clone().requires_grad_()
    csr = Csr(CSR.indptr, CSR.token_ids, weights)
    chosen = Csr.cat([csr[[3, 0, 3]], csr[[2]]])
    chosen.dense(301)[:, [0, 2, 7]].sum().backward()
    assert weights.grad.tolist() == [1, 1, 1, 2, 0, 0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"token_ids": torch.tensor([3, 5], dtype=torch.int32)}, "token_ids: torch.int32 of 1 dim"),
        ({"indptr": torch.tensor([0.0, 2.0])}, "indptr: torch.float32"),
        ({"indptr": torch.tensor([[0, 2]])}, "indptr: torch.int64 of 2 dimensions"),
        ({"indptr": torch.zeros(0, dtype=torch.int64)}, "indptr: no entry"),
        ({"indptr": torch.zeros(2, dtype=torch.int64, device="meta")}, "indptr: on meta"),
    ],
)
def test_what_a_csr_cannot_hold(change, text):
    parts = {"indptr": torch.tensor([0, 2]), "token_ids": torch.tensor([3, 5])}
    with pytest.raises(ValueError, match=text):
        Csr(**{**parts, "weights": torch.ones(2), **change})


def test_dicts_of_ids_beyond_the_table_of_strings():
    csr = Csr(torch.tensor([0, 2]), torch.tensor([3, 2**31 - 1]), torch.tensor([0.5, 2.0]))
    assert csr.dicts() == [{"3": 0.5, "2147483647": 2.0}]
