"""Contrastive losses as modules, named after their papers; logits are never stored."""

from embedfuse.losses.base import ContrastiveLoss
from embedfuse.losses.info_nce import DebiasedInfoNCE, InfoNCE, SymmetricInfoNCE
from embedfuse.losses.joint import GISTLoss, GTELoss, Qwen3Loss
from embedfuse.losses.matryoshka import MatryoshkaLoss
from embedfuse.losses.negative_queue import NegativeQueue
from embedfuse.losses.siglip import SigLIPLoss

__all__ = [
    "ContrastiveLoss",
    "DebiasedInfoNCE",
    "GISTLoss",
    "GTELoss",
    "InfoNCE",
    "MatryoshkaLoss",
    "NegativeQueue",
    "Qwen3Loss",
    "SigLIPLoss",
    "SymmetricInfoNCE",
]
