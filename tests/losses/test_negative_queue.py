"""The queue: order, checkpoint, every loss with it."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from embedfuse import losses, ops
from embedfuse.losses import NegativeQueue
from embedfuse.ops import Rows

LOSSES = {
    "InfoNCE": lambda **k: losses.InfoNCE(0.1, **k),
    "InfoNCE, smooth": lambda **k: losses.InfoNCE(0.1, label_smoothing=0.1, **k),
    "SymmetricInfoNCE": losses.SymmetricInfoNCE,
    "DebiasedInfoNCE": losses.DebiasedInfoNCE,
    "GTELoss": lambda **k: losses.GTELoss(0.1, **k),
    "Qwen3Loss": losses.Qwen3Loss,
    "SigLIPLoss": losses.SigLIPLoss,
    "MatryoshkaLoss": lambda **k: losses.MatryoshkaLoss(losses.InfoNCE(0.1), [4, 8], **k),
}


def batch(seed, rows=5, width=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator)


def test_first_in_first_out():
    queue = NegativeQueue(5, 1, ids=True)
    assert len(queue.rows().vectors) == 0

    def add(*values):
        ids = torch.tensor(values)
        queue.enqueue(Rows(ids[:, None].float(), ids))
        rows = queue.rows()
        assert rows.vectors[:, 0].tolist() == rows.ids.tolist()
        return sorted(rows.ids.tolist())

    assert add(1, 2) == [1, 2]
    assert add(3, 4) == [1, 2, 3, 4]
    assert add(5, 6) == [2, 3, 4, 5, 6]
    assert add(*range(7, 20)) == [15, 16, 17, 18, 19]
    assert add(20) == [16, 17, 18, 19, 20]


def test_state_is_in_the_checkpoint():
    queue = NegativeQueue(4, 8, ids=True, guide_dim=2)
    queue.enqueue(Rows(batch(0, 3), torch.arange(3), batch(1, 3, 2)))
    other = NegativeQueue(4, 8, ids=True, guide_dim=2)
    other.load_state_dict(queue.state_dict())
    for one in (queue, other):
        one.enqueue(Rows(batch(2, 2), torch.arange(2), batch(3, 2, 2)))
    for a, b in zip(queue.rows(), other.rows(), strict=True):
        assert torch.equal(a, b)
    assert len(other.rows().vectors) == 4


def test_errors():
    queue = NegativeQueue(4, 8, ids=True)
    for name, rows in {
        "documents.vectors": Rows(batch(0, width=7), torch.arange(5)),
        "documents.ids": Rows(batch(0)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            queue.enqueue(rows)
    with pytest.raises(ValueError, match=r"^size="):
        NegativeQueue(0, 8)
    with pytest.raises(ValueError, match=r"^loss: "):
        losses.MatryoshkaLoss(losses.InfoNCE(queue=queue), [4])


def test_negatives_of_the_step_before(backend):
    loss = losses.InfoNCE(0.1, queue=NegativeQueue(7, 8))
    documents = []
    for step in range(3):
        q, d = batch(2 * step), batch(2 * step + 1)
        bank = normalize(torch.cat([batch(0, 0), *documents])[-7:], dim=1)
        z = normalize(q, dim=1) @ torch.cat((normalize(d, dim=1), bank)).T / 0.1
        wanted = (z.logsumexp(1) - z.diagonal()).mean()
        assert loss(q, d).item() == pytest.approx(wanted.item(), rel=1e-5)
        documents.append(d)
    loss.eval()
    assert loss(q, d) == loss(q, d)


def test_ids_reach_the_queue(backend):
    loss = losses.InfoNCE(0.1, queue=NegativeQueue(5, 8, ids=True))
    q, d = batch(0), batch(1)
    ids = torch.arange(5)
    first = loss(q, Rows(d, ids))
    # Every document again: of the queue's, that of the row's own id leaves.
    z = (normalize(q, dim=1) @ normalize(d, dim=1).T / 0.1).double()
    both = torch.cat((z, z.masked_fill(torch.eye(5, dtype=torch.bool), -math.inf)), 1)
    wanted = (both.logsumexp(1) - z.diagonal()).mean()
    assert loss(q, Rows(d, ids)).item() == pytest.approx(wanted.item(), rel=1e-5) != first.item()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_one(backend, name):
    queue = NegativeQueue(12, 8)
    loss = LOSSES[name](queue=queue)
    plain = LOSSES[name]()
    values = []
    # Two forward passes before the backward passes, as where gradients are accumulated.
    for step in range(2):
        q, d = batch(2 * step).requires_grad_(), batch(2 * step + 1)
        values.append((loss(q, d), plain(q, d), q))
    (first, without, _), (second, less, q) = values
    assert first == without
    assert second > less
    (first + second).backward()
    assert q.grad.isfinite().all()
    assert q.grad.abs().max() > 0
    assert len(queue.rows().vectors) == 10
    assert "queue.vectors" in loss.state_dict()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (losses.InfoNCE, {}),
        (losses.GISTLoss, {"between_queries": False, "between_documents": False}),
    ],
)
def test_guide_of_another_dtype_than_the_vectors(kind, options):
    """The queue's guide gets the dtype of the documents' guide, not that of their vectors."""
    queue = NegativeQueue(5, 8, guide_dim=4)
    loss = kind(0.1, normalize=False, queue=queue, reduction="none", **options)
    guides = [batch(seed, width=4).bfloat16() for seed in range(2)]
    q, d = Rows(batch(0), None, guides[0]), Rows(batch(1), None, guides[1])
    loss(q, d)
    bank = Rows(d.vectors, None, d.guide)
    wanted = ops.info_nce(q, d, bank=bank, temperature=0.1).loss
    torch.testing.assert_close(loss(q, d), wanted)
