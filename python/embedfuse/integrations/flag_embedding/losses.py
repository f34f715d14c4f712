"""Drop-ins for FlagEmbedding's training models: in-batch losses without stored scores.

    from embedfuse.integrations.flag_embedding import losses

    runner.model.__class__ = losses.BiEncoderOnlyEmbedderModel  # a model that a Runner has built

Arguments, encoding and losses are the originals', with in-batch and with cross-device negatives, kl_div
distillation and MRL. The output's `scores` is None. Scores and loss are fp32, also where the originals' are
rounded to 16 bits. What needs all scores (m3_kd_loss, a compute_score_func) runs the original's code, and
the log says so once. Not offered: EncoderOnlyEmbedderM3Model, whose self-distillation adds up three
matrices of scores.
"""

import functools
import logging

import torch
from torch import Tensor

from embedfuse.compatibility import explained
from embedfuse.ops.info_nce.loss import info_nce
from embedfuse.ops.info_nce.statistics import row_products

with explained("FlagEmbedding"):
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderModel
    from FlagEmbedding.finetune.embedder.decoder_only.base import modeling as decoder_only
    from FlagEmbedding.finetune.embedder.encoder_only.base import modeling as encoder_only

logger = logging.getLogger("embedfuse")


# Overrides of AbsEmbedderModel's methods. q_reps: (queries, d). p_reps: (queries * group, d), each group
# with its positive first. Not a mixin, because `model.__class__ = ...` needs a class whose only base is the
# original.
def _in_batch_neg_loss(
    self, q_reps, p_reps, teacher_targets=None, compute_score_func=None, **kwargs
):
    if _stores_scores(self, teacher_targets, compute_score_func):
        return AbsEmbedderModel._compute_in_batch_neg_loss(
            self, q_reps, p_reps, teacher_targets, compute_score_func, **kwargs
        )
    loss = _loss(q_reps, p_reps, self.temperature)
    return None, loss + _distilled(self, q_reps, p_reps, teacher_targets)


def _cross_device_neg_loss(
    self, q_reps, p_reps, teacher_targets=None, compute_score_func=None, **kwargs
):
    if _stores_scores(self, teacher_targets, compute_score_func):
        return AbsEmbedderModel._compute_cross_device_neg_loss(
            self, q_reps, p_reps, teacher_targets, compute_score_func, **kwargs
        )
    queries, passages = (self._dist_gather_tensor(x) for x in (q_reps, p_reps))
    loss = _loss(queries, passages, self.temperature)
    return None, loss + _distilled(self, q_reps, p_reps, teacher_targets)


class BiEncoderOnlyEmbedderModel(encoder_only.BiEncoderOnlyEmbedderModel):
    """FlagEmbedding's BiEncoderOnlyEmbedderModel, with the same arguments and losses.

    With queries q_i and passages p_j, p_i+ the positive of query i:

        loss = mean over i of -log(exp(s(q_i, p_i+)) / sum over j of exp(s(q_i, p_j)))
        s(q, p) = <q, p> / temperature

    Constructor and `forward` are the original's; `forward` returns None for the scores.
    """

    _compute_in_batch_neg_loss = _in_batch_neg_loss
    _compute_cross_device_neg_loss = _cross_device_neg_loss


class BiDecoderOnlyEmbedderModel(decoder_only.BiDecoderOnlyEmbedderModel):
    """FlagEmbedding's BiDecoderOnlyEmbedderModel, with the same arguments and losses.

    The loss is that of `BiEncoderOnlyEmbedderModel`.
    """

    _compute_in_batch_neg_loss = _in_batch_neg_loss
    _compute_cross_device_neg_loss = _cross_device_neg_loss


def _distilled(model, q_reps: Tensor, p_reps: Tensor, targets: Tensor | None) -> Tensor | float:
    """The distillation loss over each query's group; targets: (queries, group), or None."""
    if targets is None:
        return 0.0
    group = len(p_reps) // len(q_reps)
    scores = row_products(q_reps, p_reps.view(len(q_reps), group, -1)) / model.temperature
    return model.distill_loss(model.kd_loss_type, targets, scores, group)


def _loss(queries: Tensor, passages: Tensor, temperature: float) -> Tensor:
    positives = torch.arange(len(queries), device=queries.device)
    positives *= len(passages) // len(queries)
    return info_nce(queries, passages, positives, temperature=temperature).loss.mean()


def _stores_scores(model, teacher_targets: Tensor | None, compute_score_func) -> bool:
    """Whether the original's code runs, which stores all scores."""
    reason = None
    if compute_score_func is not None:
        reason = f"compute_score_func={compute_score_func!r}"
    elif teacher_targets is not None and model.kd_loss_type != "kl_div":
        reason = f"kd_loss_type={model.kd_loss_type!r}"
    if reason:
        _warn_original(type(model).__name__, reason)
    return reason is not None


@functools.cache
def _warn_original(model: str, reason: str) -> None:
    logger.warning("%s: the original's code, which stores all scores, runs for %s", model, reason)
