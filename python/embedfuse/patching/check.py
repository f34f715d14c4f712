"""The self-check: the same probe batch through the original and the patched forward."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedfuse.patching.plan import has_own_forward
from embedfuse.patching.report import PatchError

# Largest |patched - original| accepted, as a part of the original's largest value. Both forwards
# round differently in every layer; a wrong mask or position moves the outputs by far more.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def check_loaded(model: nn.Module) -> None:
    """Raise PatchError for a model that has no values yet, wholly or in part."""
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    offloaded = any(has_own_forward(m) for m in model.modules())
    if missing and not offloaded:
        total = len(list(model.parameters()))
        raise PatchError(
            f"{len(missing)} of {total} parameters are on the meta device, {missing[0]} among them: "
            "load the weights before patching"
        )


def parameter_bytes(model: nn.Module) -> int:
    """Memory of the parameters, each storage counted once."""
    plain = [p.untyped_storage() for p in model.parameters() if type(p) is nn.Parameter]
    return sum({storage.data_ptr(): storage.nbytes() for storage in plain}.values())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, no gradients, no autocast; every module's own mode again afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    device = next((p.device.type for p in model.parameters()), "cpu")
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(device, enabled=False):
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
    """Batches for an encoder, compared at the tokens only: mixed lengths, and one short query."""

    batches: list[dict[str, Tensor]]

    @classmethod
    def random(cls, vocabulary: int, padding_idx: int, max_length: int, device) -> "Probe":
        generator = torch.Generator(device="cpu").manual_seed(0)
        batches = []
        for wanted in ((1, 33, 7, 18), (3,)):
            lengths = [min(n, max_length) for n in wanted]
            shape = (len(lengths), max(lengths))
            ids = torch.randint(vocabulary, shape, generator=generator, device="cpu")
            row = torch.arange(max(lengths), device="cpu")
            mask = row < torch.tensor(lengths, device="cpu")[:, None]
            ids[(ids == padding_idx) & mask] = (padding_idx + 1) % vocabulary
            ids[~mask] = padding_idx
            batches.append({"input_ids": ids.to(device), "attention_mask": mask.long().to(device)})
        return cls(batches)

    def run(self, model: nn.Module, cls: type[nn.Module]) -> dict[str, Tensor]:
        """The outputs of cls.forward; hooks on the model itself are not triggered."""
        found: dict[str, list[Tensor]] = {}
        for batch in self.batches:
            with evaluating(model):
                output = cls.forward(model, **batch, return_dict=True)
            tokens = batch["attention_mask"] != 0
            found.setdefault("last_hidden_state", []).append(output.last_hidden_state[tokens])
            if output.get("pooler_output") is not None:
                found.setdefault("pooler_output", []).append(output.pooler_output)
        return {name: torch.cat(parts) for name, parts in found.items()}
