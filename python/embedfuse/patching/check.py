"""The self-check: the same probe batch through the original and the patched forward."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedfuse.patching.report import PatchError

# Largest |patched - original| accepted, as a part of the original's largest value. Both forwards
# round differently in every layer; a wrong mask or position moves the outputs by far more.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def check_loaded(model: nn.Module) -> None:
    """Raise PatchError for a model that has no values yet, wholly or in part."""
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    offloaded = any("forward" in m.__dict__ for m in model.modules())
    if missing and not offloaded:
        total = len(list(model.parameters()))
        raise PatchError(
            f"{len(missing)} of {total} parameters are on the meta device, {missing[0]} among them: "
            "load the weights before patching"
        )


def parameter_bytes(model: nn.Module) -> int:
    """Memory of the parameters, each storage counted once."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    return sum(storages.values())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; every module's own mode again afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def deviations(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """|found - expected| / max|expected| per output. Raises PatchError where it exceeds BOUNDS."""
    result = {}
    for name, reference in expected.items():
        scale = reference.double().abs().nan_to_num().max().clamp_min(1e-6)
        difference = (found[name].double() - reference.double()).abs()
        both_nan = reference.isnan() & found[name].isnan()
        worst = (difference.masked_fill(both_nan, 0).max() / scale).item()
        bound = BOUNDS[reference.dtype]
        if not worst <= bound:
            raise PatchError(
                f"{name}: the patched forward deviates by {worst:.1e} of the largest value, "
                f"accepted for {reference.dtype} is {bound:.0e}; the model is as before"
            )
        result[name] = worst
    return result


@dataclass(frozen=True)
class Probe:
    """Sequences of mixed lengths for an encoder: forward arguments, compared at the tokens only."""

    call: dict[str, Tensor]

    @classmethod
    def random(cls, vocabulary: int, padding_idx: int, max_length: int, device) -> "Probe":
        lengths = [min(n, max_length) for n in (1, 33, 7, 18)]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=generator)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids[(ids == padding_idx) & mask] = (padding_idx + 1) % vocabulary
        ids[~mask] = padding_idx
        return cls({"input_ids": ids.to(device), "attention_mask": mask.long().to(device)})

    def run(self, model: nn.Module, cls: type[nn.Module]) -> dict[str, Tensor]:
        """The outputs of cls.forward; hooks on the model itself are not triggered."""
        with evaluating(model):
            output = cls.forward(model, **self.call, return_dict=True)
        tokens = self.call["attention_mask"] != 0
        found = {"last_hidden_state": output.last_hidden_state[tokens]}
        if output.get("pooler_output") is not None:
            found["pooler_output"] = output.pooler_output
        return found
