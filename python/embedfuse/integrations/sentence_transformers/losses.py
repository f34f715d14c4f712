"""sentence-transformers' in-batch losses from ops.info_nce's statistics: no logits are stored.

    from embedfuse.integrations.sentence_transformers.losses import MultipleNegativesRankingLoss

Constructor, embedding, gradient caching, config and citation are the original's; from embeddings to the loss
the score matrix passes a tile at a time. Every option is served; a `similarity_fct` other than cos_sim,
dot_score and a model's own `similarity` that means one of them runs the original's code, and the log says so
once. 16-bit embeddings are widened first, as there; all is then fp32 (fp64 for fp64 embeddings) up to the
embeddings' gradients, also under autocast, where the original rounds to 16 bits.
"""

import functools
import itertools
import logging
from collections.abc import Callable

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank
from torch import Tensor
from torch.nn.functional import normalize

from embedfuse.ops.info_nce.loss import combine
from embedfuse.ops.info_nce.statistics import (
    Excluded,
    Statistics,
    hard_negative_statistics,
    statistics,
)

logger = logging.getLogger("embedfuse")


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """The original's arguments and values (scale = 1 / temperature; directions, partition_mode and hardness
    as there)."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if _similarity(self) is None:
            return super().compute_loss_from_embeddings(embeddings, labels)
        return _in_batch_loss(self, embeddings)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """The original's arguments and values. mini_batch_size and mini_batch_num_tokens cut the embedding alone:
    the loss has tiles of its own, and no progress bar."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        if _similarity(self) is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = _in_batch_loss(self, [torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def _similarity(loss) -> str | None:
    """cosine, dot, or None where the original's code has to run."""
    function = loss.similarity_fct
    model = getattr(function, "__self__", None)
    name = {cos_sim: "cosine", dot_score: "dot"}.get(function)
    if isinstance(model, SentenceTransformer) and function == model.similarity:
        name = {"cosine": "cosine", "dot": "dot"}.get(model.similarity_fn_name)
    if name is None:
        _say_original(type(loss).__name__, function)
    return name


@functools.cache
def _say_original(loss: str, function: Callable) -> None:
    logger.warning(
        "%s: the original's code, which stores all scores, serves similarity_fct=%r: neither cos_sim nor "
        "dot_score",
        loss,
        function,
    )


def _in_batch_loss(loss, embeddings: list[Tensor]) -> Tensor:
    """The mean over this process's rows, with the hyperparameters of `loss`."""
    if len(embeddings) < 2:
        raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
    rows, first = len(embeddings[0]), 0
    if loss.gather_across_devices:
        embeddings = [all_gather_with_grad(x) for x in embeddings]
        first = get_rank() * rows
    embeddings = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in embeddings]
    if _similarity(loss) == "cosine":
        embeddings = [normalize(x, dim=-1) for x in embeddings]
    queries, *documents = embeddings
    batch = _Batch(loss, queries, documents, slice(first, first + rows))
    parts = batch.parts()
    positive = parts["query_to_doc"][0].target
    if loss.partition_mode == "joint":
        return combine(positive, list(itertools.chain(*parts.values()))).loss.mean()
    return torch.stack([combine(positive, part).loss for part in parts.values()]).mean()


class _Batch:
    """Statistics of each direction. queries: (batch, d). documents: per column (batch, d), the positives
    first. local: the rows whose loss is taken."""

    def __init__(self, loss, queries: Tensor, documents: list[Tensor], local: slice):
        self.loss, self.queries, self.pool = loss, queries, torch.cat(documents)
        self.q, self.d = queries[local], documents[0][local]
        self.hard = [column[local] for column in documents[1:]]
        self.scale = torch.as_tensor(loss.scale, dtype=queries.dtype, device=queries.device)
        numbers = torch.arange(len(queries), device=queries.device)
        self.own = numbers[local]
        self.same_query = Excluded(self.own)
        if self.hard:
            keys = numbers.repeat(len(documents))
            # Not self.own once more: torch.compile takes no tensor twice.
            self.same_query = Excluded(self.own, x_keys=numbers[local], y_keys=keys)

    def parts(self) -> dict[str, list[Statistics]]:
        """Negatives by direction; joint, the positive is among doc_to_query's too, as it stands in both."""
        directions, joint = self.loss.directions, self.loss.partition_mode == "joint"
        parts = {"query_to_doc": self.query_to_doc()}
        if "query_to_query" in directions:
            excluded = Excluded(self.own)
            parts["query_to_query"] = [statistics(self.q, self.queries, self.scale, excluded)]
        if "doc_to_query" in directions:
            excluded = Excluded(None if joint else self.own)
            parts["doc_to_query"] = [statistics(self.d, self.queries, self.scale, excluded)]
        if "doc_to_doc" in directions:
            parts["doc_to_doc"] = [statistics(self.d, self.pool, self.scale, self.same_query)]
        return parts

    def query_to_doc(self) -> list[Statistics]:
        strength, mode = self.loss.hardness_strength, self.loss.hardness_mode
        in_batch = strength if mode in ("in_batch_negatives", "all_negatives") else 0.0
        of_row = strength if mode in ("hard_negatives", "all_negatives") else 0.0
        if not self.hard or in_batch == of_row:
            excluded = Excluded(self.own)
            return [statistics(self.q, self.pool, self.scale, excluded, hardness=in_batch)]
        hard = torch.stack(self.hard, 1)
        return [
            statistics(self.q, self.pool, self.scale, self.same_query, hardness=in_batch),
            hard_negative_statistics(self.q, hard, self.scale, hardness=of_row),
        ]
