"""The public calls: find the class that patches an object, apply it, undo it, and embed."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from embedfuse.nn.graphs import SEQUENCES, TOKENS, bucket
from embedfuse.ops import pool_normalize
from embedfuse.packing import pack
from embedfuse.patching.families import patched_class_of
from embedfuse.patching.forward.graph_replay import warm
from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.forward.tokens import PackedStates
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options, Patched
from embedfuse.patching.wrapper import PatchedWrapper


def patch(model: Any, *, attention: str | None = None, reuse_prefixes: str = "batch") -> Report:
    """Make a live model faster, in place: same calls, same vectors.

    Padding is dropped before the first layer. Positions of `last_hidden_state` that attention_mask leaves out
    are zero (the original has values without meaning there). A decoder makes no cache unless the call says
    use_cache=True, whatever its config says. Calls that cannot run without padding run on the original
    forward; the report counts them by reason.

    First a self-check runs a small batch through both forwards. To patch twice is to patch once. Patch and
    unpatch while no other thread runs the model.

    Args:
        model: A transformers BertModel, RobertaModel or XLMRobertaModel, or its …ForSequenceClassification; a
            MistralModel, LlamaModel, Qwen2Model or Qwen3Model; a SentenceTransformer, CrossEncoder,
            MultiVectorEncoder, PyLate ColBERT or PEFT model around one of these; FlagEmbedding's
            BGEM3FlagModel, FlagLLMModel or FlagReranker. Its class becomes a subclass of the same name; its
            parameters stay where they are.
        attention: None, the model's own, or "bidirectional" for a decoder trained so (LLM2Vec): every token
            attends to all tokens of its text, without a window.
        reuse_prefixes: For a decoder with causal attention, in inference: texts that begin with the same
            tokens compute these once. "batch": within a call. "stream": also across calls, where the last
            token is pooled (`embed`, SentenceTransformer, FlagLLMModel), with up to 256 MiB of keys and
            values kept. "off": never. What is kept is dropped when a parameter changes; an edit through
            `.data` is not noticed. "stream" is "batch" while the model has custom modules (LoRA), parameters
            with gradients or made under inference_mode, or rotary angles that depend on the batch. Encoders,
            and attention="bidirectional", accept "off" and "batch", and compute every token.

    Returns:
        The model's Report, which later calls keep up to date.

    Raises:
        TypeError: The model is of another kind, or an object around one.
        ValueError: An option is unknown, or not possible for this model, or the model was patched before with
            other options.
        PatchError: Weights are on the meta device, or the outputs of both forwards differ by more than the
            dtype's bound. The model is as before.
    """
    options = Options(attention, reuse_prefixes)
    if isinstance(model, Patched):
        model.check_options(options)
        return model._embedfuse.report
    return patched_class_of(model).install(model, options)


def unpatch(model: Any) -> None:
    """Undo `patch`: class, parameters and outputs are as before, bit for bit.

    Args:
        model: A patched object.

    Raises:
        ValueError: The model is not patched.
    """
    _require_patched(model)
    model.uninstall()


def is_patched(model: object) -> bool:
    """Whether `patch` was applied to this object and not undone.

    Args:
        model: Any object. One around a patched model, but not patched itself, counts as not patched.
    """
    return isinstance(model, Patched)


@contextlib.contextmanager
def patched(model: Any, **options: Any) -> Iterator[Report]:
    """Context manager: `patch` on entry, `unpatch` on exit. A model that was patched before stays patched.

    Args:
        model: As in `patch`.
        **options: As in `patch`.

    Yields:
        The Report.

    Raises:
        TypeError, ValueError, PatchError: As `patch` does.
    """
    was_patched = is_patched(model)
    report = patch(model, **options)
    try:
        yield report
    finally:
        if not was_patched:
            unpatch(model)


def report(model: Any) -> Report:
    """The Report of a patched model, kept up to date.

    Args:
        model: A patched object.

    Raises:
        ValueError: The model is not patched.
    """
    _require_patched(model)
    return model._embedfuse.report


def warm_up(
    model: Any, *, tokens: int = 512, sequences: int = 8, pooling: str | None = None
) -> int:
    """Capture the CUDA graphs for small batches before the first of these come.

    Otherwise the second call of each bucket of (tokens, sequences) captures its graph, and takes some tenths
    of a second longer. Call this before other threads use the GPU: waiting for the whole device
    (torch.cuda.synchronize) fails in a thread while another one captures.

    Args:
        model: A patched model, or a patched object around one, in eval mode.
        tokens: Of the largest batches to come, without padding; at most 1,024.
        sequences: Of the largest batches to come; at most 64.
        pooling: What they will be pooled with, as in `embed`; None for all states. "cls" for a classifier.

    Returns:
        How many graphs the model has then; 0 where it can have none, and the report says why.

    Raises:
        ValueError: The model is not patched or is in training, the batches are larger, or autocast is on.
    """
    _require_patched(model)
    if bucket(tokens, sequences) is None:
        raise ValueError(
            f"tokens={tokens}, sequences={sequences}: accepted are 1 to {TOKENS[-1]} and 1 to "
            f"{SEQUENCES[-1]}"
        )
    while isinstance(model, PatchedWrapper):
        model = model.inner_model(model)
    pruned = pooling in model.pruned_poolings  # pyright: ignore[reportOperatorIssue] # a PackedModel
    return warm(model, tokens, sequences, pooling if pruned else None)


def embed(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    pooling: str,
    pooling_mask: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Pooled, normalised vectors of a batch of token ids. Differentiable.

    Args:
        model: A transformers model without a head that `patch` accepts, or a PEFT model around one. States of
            a patched model are pooled without padding.
        input_ids: (batch, length).
        attention_mask: (batch, length); None for a batch without padding.
        pooling: "cls", "last", "mean" or "weighted_mean", as in `ops.pool_normalize`.
        pooling_mask: (batch, length), nonzero at the tokens to pool, adjacent in each row; None for all.
            LLM2Vec leaves the instruction out.
        normalize: Whether to divide each vector by its L2 norm.

    Returns:
        (batch, hidden) in the model's dtype.

    Raises:
        TypeError: Another model.
        ValueError: A mask of another shape, or a row without tokens or with padding between tokens.
    """
    tower: nn.Module = patched_class_of(model).tower(model)
    call = {"input_ids": input_ids, "attention_mask": attention_mask}
    mask, pooled = attention_mask, None
    if pooling_mask is not None:
        if pooling_mask.shape != input_ids.shape:
            raise ValueError(
                f"pooling_mask: shape {tuple(pooling_mask.shape)}; accepted is that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )
        mask = pooling_mask if attention_mask is None else attention_mask * pooling_mask
        pooled = pack(input_ids, mask, "pooling_mask")
    wanted = pooling if pooled is None else None
    found = tower.packed_states(call, pooling=wanted) if isinstance(tower, PackedModel) else None
    if found is not None:
        if mask is not None and pooled is not None:
            found = PackedStates(found.states[found.packed.pack(mask) != 0], pooled)
        return found.pool(pooling, normalize)
    pack(input_ids, attention_mask)  # for its errors
    states = tower(**call, return_dict=True).last_hidden_state
    return pool_normalize(states, attention_mask=mask, pooling=pooling, normalize=normalize)


def _require_patched(model: object) -> None:
    if not is_patched(model):
        raise ValueError(f"model: this {type(model).__name__} is not patched")
