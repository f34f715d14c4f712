"""The self-check: one probe batch through the original and the packed forward, before a layout is trusted."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from embedfuse.packing import pack
from embedfuse.patching.check import BOUNDS, deviations, evaluating, longest_row
from embedfuse.patching.forward.graph_replay import refusal
from embedfuse.patching.layout import Layout, name_of
from embedfuse.patching.report import PatchError


def self_check(model: nn.Module, layout: Layout) -> dict[str, float]:
    """Deviations of a patched model's packed forward from its original one. PatchError if too large.

    A foreign module of each class is asked on its own too, whether it mixes rows.
    """
    probe = model.probe(model)

    def packed_output(call: dict):
        packed = pack(call["input_ids"], call["attention_mask"])
        tokens = model.tokens_of(call, packed)
        return model.output_of(call, *model.run(layout, packed, tokens, model.head_pooling))

    asked = {m: path for m, path in layout.one_of_each_kind().items() if model.takes_rows(path)}
    with _inputs_of(asked) as inputs:
        expected = probe.run(model, model.run_original)
    tokens = probe.batches[0]["attention_mask"] != 0
    for module, x in inputs.items():
        if reason := _mixes_rows(module, x, tokens):
            raise PatchError(f"{asked[module]} is a {name_of(type(module))}, which {reason}")
    try:
        found = deviations(model, expected, probe.run(model, packed_output))
        state = model._embedfuse
        if layout is state.layout and refusal(state.graphs, model.device) is None:
            # What came once is captured now.
            deviations(model, expected, probe.run(model, packed_output))
    except Exception as error:
        if not layout.foreign_kinds:
            raise
        raise PatchError(f"{error}{layout.suspect()}") from error
    model._embedfuse.trusted = layout.foreign_kinds
    return found


@contextlib.contextmanager
def _inputs_of(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Filled with each module's first input, while a forward runs inside."""
    inputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor):
            inputs.setdefault(module, args[0])

    handles = [m.register_forward_pre_hook(keep) for m in modules]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _mixes_rows(module: nn.Module, x: Tensor, tokens: Tensor) -> str | None:
    """What is wrong with a module whose result for a token depends on the others that come with it.

    With parameters drawn anew, because an adapter that was just made adds zero. x: (batch, length, …) or
    (1, length, …), where tokens (batch, length) are no padding; anything else has no rows of tokens.
    """
    if x.shape[:2] not in (tokens.shape, (1, tokens.shape[1])):
        return None
    x = x.expand(*tokens.shape, *x.shape[2:])
    generator = torch.Generator(x.device).manual_seed(0)
    parameters = dict(module.named_parameters())
    # In 16 bits, rounding would hide what adapters mix; weights of a class of their own stay as they are.
    widened = all(type(p) is nn.Parameter for p in parameters.values())

    def wide(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if widened else dtype

    drawn = {
        name: torch.randn(p.shape, generator=generator, dtype=wide(p.dtype), device=p.device)
        for name, p in parameters.items()
        if type(p) is nn.Parameter and p.is_floating_point() and p.device == x.device
    }
    buffers = module.named_buffers()
    drawn |= {name: b.to(wide(b.dtype)) for name, b in buffers if b.is_floating_point()}
    x = x.to(wide(x.dtype)) if x.is_floating_point() else x
    with evaluating(module):
        try:
            padded = functional_call(module, drawn, (x,))
        except Exception:
            return None  # it takes no other parameters; the probe looks at it all the same
        try:
            packed = functional_call(module, drawn, (x[tokens],))
        except Exception as error:
            return f"takes no tokens without a batch: {error}"
    if not isinstance(padded, Tensor) or padded.shape[:2] != tokens.shape:
        return None
    reference, found = (t.double().nan_to_num() for t in (padded[tokens], packed))
    difference = longest_row(found - reference) / longest_row(reference).clamp_min(1e-6)
    if difference.item() <= BOUNDS.get(packed.dtype, 0):
        return None
    return "mixes rows: a token's result depends on the others of its batch"
