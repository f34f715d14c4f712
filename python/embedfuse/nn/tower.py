"""What the towers share: steps by whole sequences, rows of the last layer, gradient checkpointing."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from embedfuse.nn.linear import is_plain, linear, linears
from embedfuse.packing import Packed

# Bounds the activations of a large batch on the CPU. Speed hardly depends on it: 1,024 to all tokens
# at once differed by at most 5 % (all-MiniLM-L6-v2, 160 long docstrings, 2 cores of an EPYC 9004).
STEP_TOKENS = 2048


def steps(
    x: Tensor, packed: Packed, rows: Tensor | None
) -> Iterator[tuple[slice, Packed, Tensor | None]]:
    """The parts of x (tokens, hidden) that a tower runs in turn: its tokens, their sequences, their rows.

    rows: (batch,), one token of each sequence, or None. In inference on the CPU a part holds whole
    sequences of about STEP_TOKENS tokens, otherwise there is one part.
    """
    if rows is not None and rows.shape != (packed.sequences,):
        raise ValueError(
            f"rows: shape {tuple(rows.shape)}; accepted is one row per sequence, ({packed.sequences},)"
        )
    in_steps = is_plain(x) and x.is_cpu and packed.tokens > STEP_TOKENS
    first_token = first_sequence = 0
    for part in packed.split(STEP_TOKENS) if in_steps else [packed]:
        last_token, last_sequence = first_token + part.tokens, first_sequence + part.sequences
        of_part = None if rows is None else rows[first_sequence:last_sequence] - first_token
        yield slice(first_token, last_token), part, of_part
        first_token, first_sequence = last_token, last_sequence


def project(
    qkv: tuple[nn.Module, ...], x: Tensor, rows: Tensor | None, plain: bool
) -> tuple[Tensor, ...]:
    """Query, key and value of x (tokens, hidden); with `rows`, the query of these tokens alone."""
    if rows is None:
        return linears(qkv, x, plain)
    to_query, *to_key_value = qkv
    key, value = linears(tuple(to_key_value), x, plain)
    return linear(to_query, x[rows], plain), key, value


def checkpointed(block: nn.Module, step: Callable, *state):
    """step(*state); recomputed in the backward pass where transformers' checkpointing is on."""
    if getattr(block, "gradient_checkpointing", False) and block.training:
        return block._gradient_checkpointing_func(step, *state)
    return step(*state)
