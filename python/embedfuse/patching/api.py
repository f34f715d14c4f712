"""The public calls: find the recipe of an object, apply it, undo it."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from embedfuse.nn.graphs import SEQUENCES, TOKENS, bucket
from embedfuse.ops import pool_normalize
from embedfuse.packing import pack
from embedfuse.patching.families import patched_class_of
from embedfuse.patching.forward.graph_replay import warm
from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.layout import is_hooked
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options, Patched
from embedfuse.patching.wrapper import PatchedWrapper


def patch(model, *, attention: str | None = None, reuse_prefixes: str = "batch") -> Report:
    """Make a live model faster, in place: same calls, same vectors.

    model: a transformers BertModel, RobertaModel or XLMRobertaModel, or its
        …ForSequenceClassification; a MistralModel, LlamaModel, Qwen2Model or Qwen3Model; a
        SentenceTransformer, CrossEncoder, MultiVectorEncoder, PyLate ColBERT or PEFT model that holds
        one; FlagEmbedding's BGEM3FlagModel, FlagLLMModel or FlagReranker. Its class becomes a subclass
        of the same name; no parameter moves.

    attention: None, the model's own, or "bidirectional" for a decoder trained to look both ways
        (LLM2Vec): every token sees all tokens of its text, without a window.
    reuse_prefixes: of a decoder with causal attention, in inference. Texts that begin with the same
        tokens run these once: "batch" within a call; "stream" across calls too, where the last token is
        pooled (`embed`, SentenceTransformer, FlagLLMModel), with keys and values of up to 256 MiB kept;
        "off" never. What is kept is forgotten when a parameter changes, but an edit through `.data` is
        not seen. Nothing is kept ("stream" is "batch") while the model has modules that are not
        transformers' own (LoRA), parameters with gradients or made under inference_mode, or rotary
        angles that depend on the batch. Encoders, and attention="bidirectional", accept "off" and "batch",
        and run every token.

    Padding is dropped before the first layer. Positions of `last_hidden_state` that attention_mask
    leaves out are zero (the original fills them with values that mean nothing). A decoder makes no
    cache unless the call says use_cache=True, whatever its config. Calls that the
    packed forward cannot serve run on the original forward; the report counts them by reason.

    A probe batch runs through both forwards first. Returns the live Report; patching twice is one
    patch. Raises TypeError for another kind of object or an object that holds one, ValueError for an
    option that it does not know, one that the model cannot have, or other options than it was patched with
    before, PatchError (and changes nothing) for weights on the meta device or outputs that differ by more
    than the dtype's bound.
    Patch and unpatch while no other thread is running the model.
    """
    options = Options(attention, reuse_prefixes)
    if isinstance(model, Patched):
        model.check_options(options)
        return model._embedfuse.report
    return patched_class_of(model).install(model, options)


def unpatch(model) -> None:
    """Put a patched model back: class, parameters and outputs as before, bit for bit.

    Raises ValueError for a model that is not patched.
    """
    if not isinstance(model, Patched):
        raise ValueError(f"model: this {type(model).__name__} is not patched")
    model.uninstall()


@contextlib.contextmanager
def patched(model, **options) -> Iterator[Report]:
    """patch on entry, unpatch on exit; a model that was patched before stays patched."""
    before = isinstance(model, Patched)
    report = patch(model, **options)
    try:
        yield report
    finally:
        if not before:
            unpatch(model)


def report(model) -> Report:
    """The Report of a patched model, kept up to date. ValueError for one that is not patched."""
    if not isinstance(model, Patched):
        raise ValueError(f"model: this {type(model).__name__} is not patched")
    return model._embedfuse.report


def warm_up(model, *, tokens: int = 512, sequences: int = 8, pooling: str | None = None) -> int:
    """Capture the CUDA graphs that serve small batches before the first of them come.

    Without it a bucket of (tokens, sequences) is captured by its second call, which takes that call
    some tenths of a second. Do it before other threads use the GPU: waiting for the whole device
    (torch.cuda.synchronize) fails in a thread while another one captures.

    model: a patched model, or an object that holds one. tokens, sequences: of the largest batches to
        come, padding not counted; at most 1,024 and 64. pooling: what they will be pooled with, as in
        `embed`; None for all states. A classifier pools with "cls".

    Returns how many graphs the model has then: 0 where it can have none, and its report tells why.
    Raises ValueError for a model that is not patched or is in training, larger batches, and under autocast.
    """
    if not isinstance(model, Patched):
        raise ValueError(f"model: this {type(model).__name__} is not patched")
    if bucket(tokens, sequences) is None:
        raise ValueError(
            f"tokens={tokens}, sequences={sequences}: accepted are 1 to {TOKENS[-1]} and 1 to "
            f"{SEQUENCES[-1]}"
        )
    while isinstance(model, PatchedWrapper):
        model = model.held(model)
    return warm(model, tokens, sequences, pooling if pooling in model.pruned_poolings else None)


def embed(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    pooling: str,
    pooling_mask: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Pooled, normalised vectors of a batch of token ids.

    model: a transformers model without a head that `patch` takes, or a PEFT model on one. Patched, the
        states are pooled where they lie, without padding.
    input_ids, attention_mask: (batch, length); no mask means no padding.
    pooling: "cls", "last", "mean" or "weighted_mean", as in ops.pool_normalize.
    pooling_mask: (batch, length), tokens to pool, side by side in each row; None pools all. LLM2Vec leaves
        the instruction out.

    Returns (batch, hidden) in the model's dtype. Differentiable under grad. Raises ValueError for a mask
    of another shape, a row without tokens or with a hole, TypeError for another model.
    """
    model = patched_class_of(model).tower(model)
    call = {"input_ids": input_ids, "attention_mask": attention_mask}
    mask = attention_mask
    if pooling_mask is not None:
        if pooling_mask.shape != input_ids.shape:
            raise ValueError(
                f"pooling_mask: shape {tuple(pooling_mask.shape)}; accepted is that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )
        mask = pooling_mask if attention_mask is None else attention_mask * pooling_mask
        pooled = pack(input_ids, mask, "pooling_mask")
    if isinstance(model, PackedModel) and not is_hooked(model):
        found = model.packed_states(call, pooling if pooling_mask is None else None, count=False)
        if found is not None:
            states, packed = found
            if pooling_mask is not None:
                states, packed = states[packed.pack(mask) != 0], pooled
            return pool_normalize(
                states, cu_seqlens=packed.cu_seqlens, pooling=pooling, normalize=normalize
            )
    pack(input_ids, attention_mask)  # for its errors
    states = model(**call, return_dict=True).last_hidden_state
    return pool_normalize(states, attention_mask=mask, pooling=pooling, normalize=normalize)
