"""Errors name the argument, what came and what is accepted."""

import pytest
import torch

import embedfuse
from embedfuse import ops
from embedfuse.ops import Rows, info_nce

Q, POOL = torch.ones(2, 4), torch.ones(5, 4)
NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": Q[0]}),
        ("q", {"q": Q.long()}),
        ("q", {"q": Q[:, :0], "pool": POOL[:, :0]}),
        ("pool", {"pool": POOL[:, :3]}),
        ("pool", {"pool": POOL.half()}),
        ("pool", {"pool": POOL[:0]}),
        ("pool", {"pool": POOL[:1]}),
        ("pool", {"pool": POOL.to("meta")}),
        ("bank", {"bank": POOL[:, :3]}),
        ("bank", {"bank": POOL.to("meta")}),
        ("hard_negatives", {"hard_negatives": POOL}),
        ("hard_negatives", {"hard_negatives": torch.ones(3, 2, 4)}),
        ("labels", {"labels": torch.tensor([0, 5])}),
        ("labels", {"labels": torch.tensor([-1, 0])}),
        ("labels", {"labels": torch.tensor([0, 1, 2])}),
        ("labels", {"labels": torch.tensor([0, 1], dtype=torch.int32)}),
        ("labels", {"labels": torch.tensor([0, 1], device="meta")}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": NAN}),
        ("temperature", {"temperature": torch.tensor(0.0)}),
        ("temperature", {"temperature": torch.tensor([0.1, 0.2])}),
        ("temperature", {"temperature": torch.tensor(1)}),
        ("label_smoothing", {"label_smoothing": 1.0}),
        ("label_smoothing", {"label_smoothing": -0.1}),
        ("pool.ids", {"pool": Rows(POOL, torch.arange(4))}),
        ("pool.ids", {"pool": Rows(POOL, torch.arange(5).int())}),
        ("bank.ids", {"bank": Rows(POOL, torch.arange(5, device="meta"))}),
        ("q.ids", {"q": Rows(Q, torch.arange(2))}),
        ("q.guide", {"q": Rows(Q, guide=Q.double())}),
        ("pool.guide", {"pool": Rows(POOL, guide=POOL)}),
        ("pool.guide", {"q": Rows(Q, guide=Q), "pool": Rows(POOL, guide=POOL[:, :2])}),
        ("pool.guide", {"q": Rows(Q, guide=Q), "pool": Rows(POOL, guide=POOL[:3])}),
    ],
)
def test_errors(name, changes):
    with pytest.raises(ValueError, match=rf"^{name}[:=]"):
        info_nce(**({"q": Q, "pool": POOL} | changes))


def test_a_batch_without_rows_has_no_losses():
    q, pool = Q[:0].requires_grad_(), POOL.clone().requires_grad_()
    for backend in ("reference", "cpp"):
        with embedfuse.use_backend(backend):
            out = info_nce(q, pool, bank=POOL, hard_negatives=torch.ones(0, 2, 4))
            assert [x.shape for x in out] == [(0,)] * 3
            grads = torch.autograd.grad(out.loss.sum(), (q, pool))
            assert [x.shape for x in grads] == [(0, 4), (5, 4)]
            assert grads[1].eq(0).all()


def test_the_kernel_guards_its_buffer(monkeypatch):
    from embedfuse.ops.info_nce import tiles

    monkeypatch.setitem(tiles.TILE, "cpu", (8, 5000))
    with pytest.raises(ValueError, match=r"^scores: 5000 columns"), embedfuse.use_backend("cpp"):
        info_nce(Q, POOL.repeat(1000, 1))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("q", lambda x: ops.info_nce([[1.0]], x)),
        ("pool", lambda x: ops.info_nce(x, None)),
        ("labels", lambda x: ops.info_nce(x, x, [0, 1])),
        ("pool.ids", lambda x: ops.info_nce(x, ops.Rows(x, ids=[1, 2]))),
        ("temperature", lambda x: ops.info_nce(x, x, temperature="warm")),
        ("temperature", lambda x: ops.info_nce(x, x, temperature=1e-39)),
        ("temperature", lambda x: ops.info_nce(x, x, temperature=torch.tensor(1e-39))),
        ("temperature", lambda x: ops.info_nce(x, x, temperature=float("inf"))),
        ("cu_seqlens", lambda x: ops.pool_normalize(x, cu_seqlens=[0, 2])),
        ("attention_mask", lambda x: ops.pool_normalize(x[None], attention_mask=[[1, 1]])),
        ("input_ids", lambda x: ops.sparse_scatter(x, [[1, 2], [3, 4]])),
        ("indptr", lambda x: ops.Csr([0, 1], torch.tensor([1]), torch.ones(1))),
        ("queries", lambda x: ops.lexical_scores([{"1": 1.0}], [{"1": 1.0}])),
    ],
)
def test_other_types_are_named(name, call):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}[:=]"):
        call(torch.ones(2, 2))
