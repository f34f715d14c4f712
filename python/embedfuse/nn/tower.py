"""What both towers use: splitting a batch into steps, the query rows of the last layer, checkpointing."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from embedfuse.nn.linear import is_inference, linear, linears
from embedfuse.packing import Packed

# Tokens per step on the CPU, which limits the memory for activations. Speed hardly depends on it: from 1,024
# tokens to all at once the times differed by at most 5 % (all-MiniLM-L6-v2, 160 long docstrings, 2 cores of
# an EPYC 9004).
STEP_TOKENS = 2048


def split_into_steps(
    x: Tensor, packed: Packed, rows: Tensor | None
) -> Iterator[tuple[slice, Packed, Tensor | None]]:
    """The steps in which a tower processes x (tokens, hidden): (its tokens, their sequences, its rows).

    rows: (batch,), one token of each sequence, or None. A step's rows count from its first token.
    In inference on the CPU a step holds whole sequences of about STEP_TOKENS tokens; otherwise one step
    holds the batch.
    """
    if rows is not None and rows.shape != (packed.sequences,):
        raise ValueError(
            f"rows: shape {tuple(rows.shape)}; accepted is one row per sequence, ({packed.sequences},)"
        )
    split = is_inference(x) and x.is_cpu and packed.tokens > STEP_TOKENS
    if not split:
        yield slice(0, packed.tokens), packed, rows
        return
    first_token = first_sequence = 0
    for step in packed.split(STEP_TOKENS):
        last_token, last_sequence = first_token + step.tokens, first_sequence + step.sequences
        step_rows = None if rows is None else rows[first_sequence:last_sequence] - first_token
        yield slice(first_token, last_token), step, step_rows
        first_token, first_sequence = last_token, last_sequence


def project(
    qkv: tuple[nn.Module, ...], x: Tensor, rows: Tensor | None, inference: bool
) -> tuple[Tensor, ...]:
    """Query, key and value of x (tokens, hidden); if `rows` is given, the query of those tokens only."""
    if rows is None:
        return linears(qkv, x, inference)
    to_query, *to_key_value = qkv
    key, value = linears(tuple(to_key_value), x, inference)
    return linear(to_query, x[rows], inference), key, value


def checkpointed(block: nn.Module, layer: Callable, *state):
    """layer(*state), recomputed in the backward pass if the block's gradient checkpointing is on."""
    if getattr(block, "gradient_checkpointing", False) and block.training:
        return block._gradient_checkpointing_func(layer, *state)
    return layer(*state)
