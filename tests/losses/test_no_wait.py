"""A step launches its backward pass before the GPU has finished the forward: no loss waits for it."""

import pytest
import torch

from embedfuse import losses
from tests.no_wait import META, NoTensorOfAList, NoWait

LOSSES = {
    "InfoNCE": losses.InfoNCE(temperature=0.05),
    "SymmetricInfoNCE": losses.SymmetricInfoNCE(),
    "DebiasedInfoNCE": losses.DebiasedInfoNCE(),
    "GTELoss": losses.GTELoss(),
    "Qwen3Loss": losses.Qwen3Loss(),
    "SigLIPLoss": losses.SigLIPLoss(),
    "MatryoshkaLoss": losses.MatryoshkaLoss(losses.InfoNCE(), [8, 16]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)
    loss = LOSSES[name].to(META)
    q, d = (torch.randn(5, 16, device=META).requires_grad_() for _ in range(2))
    with NoTensorOfAList(), NoWait():
        value = loss(q, d)
        value.backward()
    assert value.shape == ()
    assert q.grad.shape == d.grad.shape == (5, 16)
