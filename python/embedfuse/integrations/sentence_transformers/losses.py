"""Drop-ins for sentence-transformers' in-batch losses: no logits are stored.

    from embedfuse.integrations.sentence_transformers import losses

    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)
    SentenceTransformerTrainer(model, loss=loss, ...)

Constructor, embedding, gradient caching, config and citation are the original's. From the embeddings to the
loss, a tile of the score matrix is computed at a time, by ops.info_nce's statistics. Every option has this
path. With a `similarity_fct` other than cos_sim, dot_score and a model's `similarity` that is one of the
two, the original's code runs, and the log says so once. 16-bit embeddings are converted to fp32 first, as
in the original. Scores, loss and gradients up to the embeddings are then fp32 (fp64 for fp64 embeddings),
also under autocast, where the original rounds to 16 bits.
"""

import functools
import itertools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from embedfuse.compatibility import explained
from embedfuse.ops.info_nce.loss import combine
from embedfuse.ops.info_nce.statistics import (
    Excluded,
    Statistics,
    hard_negative_statistics,
    statistics,
)

with explained("sentence-transformers"):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank

logger = logging.getLogger("embedfuse")


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """sentence-transformers' MultipleNegativesRankingLoss, with the same arguments and values.

    With s_ij the similarity of query i and document j, and document i its positive:

        loss = mean over i of -log(exp(scale * s_ii) / sum over j of exp(scale * s_ij))

    `directions` adds other similarities to the sum; further columns of the data are hard negatives.

    Args:
        model: The SentenceTransformer that is trained.
        scale: 1 / temperature.
        similarity_fct: cos_sim, dot_score or `model.similarity`; with another one the original's code runs.
        gather_across_devices: Whether the other processes' rows are negatives too (torch.distributed).
        directions: Of "query_to_doc", "query_to_query", "doc_to_query" and "doc_to_doc".
        partition_mode: "joint": one sum over all directions; "per_direction": the mean of a loss for each.
        hardness_mode: "in_batch_negatives", "hard_negatives" or "all_negatives": the logits to which
            hardness_strength * cosine is added, without a gradient; None: no logits.
        hardness_strength: 0 or more.

    Raises:
        ValueError: As the original.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if _similarity(self) is None:
            return super().compute_loss_from_embeddings(embeddings, labels)
        return _in_batch_loss(self, embeddings)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """sentence-transformers' CachedMultipleNegativesRankingLoss, with the same arguments and values.

    Texts are embedded in mini-batches, twice (GradCache, arXiv 2101.06983). The loss is computed in tiles,
    which mini_batch_size does not change.

    Args:
        model: The SentenceTransformer that is trained.
        mini_batch_size: Texts in one forward of the model.
        mini_batch_num_tokens: Tokens in one forward of the model, without padding, in place of
            mini_batch_size.
        show_progress_bar: Whether a bar shows the embedding.
        scale: As in `MultipleNegativesRankingLoss`, like all other arguments.

    Raises:
        ValueError: As the original.
    """

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
    """cosine, dot, or None where the original's code runs."""
    function = loss.similarity_fct
    model = getattr(function, "__self__", None)
    name = {cos_sim: "cosine", dot_score: "dot"}.get(function)
    if isinstance(model, SentenceTransformer) and function == model.similarity:
        name = {"cosine": "cosine", "dot": "dot"}.get(model.similarity_fn_name)
    if name is None:
        _warn_original(type(loss).__name__, function)
    return name


@functools.cache
def _warn_original(loss: str, function: Callable) -> None:
    logger.warning(
        "%s: the original's code, which stores all scores, runs for similarity_fct=%r: neither cos_sim nor "
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
    """Statistics of each direction.

    queries: (batch, d). documents: (batch, d) per column, the positives first. local: this process's rows.
    """

    def __init__(self, loss, queries: Tensor, documents: list[Tensor], local: slice):
        self.loss, self.queries, self.pool = loss, queries, torch.cat(documents)
        self.q, self.d = queries[local], documents[0][local]
        self.hard = [column[local] for column in documents[1:]]
        self.scale = torch.as_tensor(loss.scale, dtype=queries.dtype, device=queries.device)
        index = torch.arange(len(queries), device=queries.device)
        self.rows = index[local]
        self.same_query = Excluded(self.rows)
        if self.hard:
            keys = index.repeat(len(documents))
            # Not self.rows again: torch.compile takes no tensor twice.
            self.same_query = Excluded(self.rows, x_keys=index[local], y_keys=keys)

    def parts(self) -> dict[str, list[Statistics]]:
        """Negatives by direction. Joint, doc_to_query counts the positive once more, as the original does."""
        directions, joint = self.loss.directions, self.loss.partition_mode == "joint"
        parts = {"query_to_doc": self.query_to_doc()}
        if "query_to_query" in directions:
            excluded = Excluded(self.rows)
            parts["query_to_query"] = [statistics(self.q, self.queries, self.scale, excluded)]
        if "doc_to_query" in directions:
            excluded = Excluded(None if joint else self.rows)
            parts["doc_to_query"] = [statistics(self.d, self.queries, self.scale, excluded)]
        if "doc_to_doc" in directions:
            parts["doc_to_doc"] = [statistics(self.d, self.pool, self.scale, self.same_query)]
        return parts

    def query_to_doc(self) -> list[Statistics]:
        strength, mode = self.loss.hardness_strength, self.loss.hardness_mode
        in_batch = strength if mode in ("in_batch_negatives", "all_negatives") else 0.0
        of_row = strength if mode in ("hard_negatives", "all_negatives") else 0.0
        if not self.hard or in_batch == of_row:
            excluded = Excluded(self.rows)
            return [statistics(self.q, self.pool, self.scale, excluded, hardness=in_batch)]
        hard = torch.stack(self.hard, 1)
        return [
            statistics(self.q, self.pool, self.scale, self.same_query, hardness=in_batch),
            hard_negative_statistics(self.q, hard, self.scale, hardness=of_row),
        ]
