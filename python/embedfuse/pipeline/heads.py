"""BGE-M3's sparse and multi-vector heads (arXiv 2402.03216), read from the checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file


@dataclass(frozen=True)
class Heads:
    """The heads of a checkpoint; None for one that it does not have.

    Attributes:
        sparse: hidden -> 1, the lexical weight of a token.
        multi: hidden -> columns, the vector of a token.
    """

    sparse: nn.Linear | None = None
    multi: nn.Linear | None = None


def load_heads(
    model: str, hidden: int, device: torch.device | str, dtype: torch.dtype, **hub: Any
) -> Heads:
    """Read sparse_linear.pt and colbert_linear.pt. Pickled code in them is never run.

    Args:
        model: folder or hub name.
        hidden: size of the model's hidden states.
        device: where to put the heads.
        dtype: of their weights.
        hub: arguments of transformers' from_pretrained (revision, token, ...).

    Raises:
        ValueError: A file holds anything but a weight with `hidden` columns and its bias.
    """
    heads = {}
    for head, file, rows in (
        ("sparse", "sparse_linear.pt", 1),
        ("multi", "colbert_linear.pt", None),
    ):
        path = cached_file(model, file, _raise_exceptions_for_missing_entries=False, **hub)
        if path is None:
            continue
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = _shapes(state)
        columns = (*shapes.get("weight", ()), 0)[0] if rows is None else rows
        weight = {"weight": (columns, hidden)}
        if shapes not in (weight, weight | {"bias": (columns,)}):
            raise ValueError(
                f"{file}: {shapes or type(state).__name__}; accepted is weight "
                f"({rows or 'columns'}, {hidden}), with or without bias ({rows or 'columns'},)"
            )
        linear = nn.Linear(hidden, columns, bias="bias" in state)
        linear.load_state_dict(state)
        heads[head] = linear.to(device, dtype).requires_grad_(False)
    return Heads(**heads)


def _shapes(state) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a state dict; empty for any other object."""
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        return {}
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
