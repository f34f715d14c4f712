"""What checks share: probe batches, the deviation of outputs and its bounds, and inputs that are refused."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedfuse.packing import Packed
from embedfuse.patching.layout import has_own_forward
from embedfuse.patching.report import PatchError

# Accepted deviations (see `deviations`). Both forwards round differently in every layer: on BGE-M3's
# 24 layers with random weights, bfloat16 differs by 0.03 to 0.04, and positions that are off by one move
# the outputs by 0.57 to 0.9.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.12}


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


def table_size(table: nn.Module) -> int | None:
    """Rows of an embedding table that is read as it lies; None for one that computes (LoRA, max_norm)."""
    read = type(table) is nn.Embedding and table.max_norm is None
    return table.num_embeddings if read else None


def check_ids(input_ids: Tensor, packed: Packed, words: int | None) -> None:
    """Raise IndexError for a token id that the embedding table does not have. words: its size, if known."""
    ids = input_ids if packed.ids is None else packed.ids
    if words and ids.is_cpu and ids.numel():  # on a GPU the look would wait for it
        low, high = ids.aminmax()
        if low < 0 or high >= words:
            bad = int(low if low < 0 else high)
            raise IndexError(f"input_ids: token {bad}; accepted are 0 to {words - 1}")


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


def deviations(
    model: nn.Module, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> dict[str, float]:
    """max_r |found_r - expected_r| / max_r |expected_r| per output, with the L2 norms of its rows r.

    Raises PatchError where it exceeds the bound of the coarsest dtype among output and parameters.
    """
    # A head kept in fp32 scores what layers in 16 bits have rounded.
    dtypes = {p.dtype for p in model.parameters()} & BOUNDS.keys()
    result = {}
    for name, reference in expected.items():
        difference = found[name].double() - reference.double()
        both_nan = reference.isnan() & found[name].isnan()
        scale = longest_row(reference.double().nan_to_num()).clamp_min(1e-6)
        worst = (longest_row(difference.masked_fill(both_nan, 0)) / scale).item()
        dtype = max({reference.dtype} | dtypes, key=BOUNDS.__getitem__)
        bound = BOUNDS[dtype]
        if not worst <= bound:
            raise PatchError(
                f"{name}: the patched forward deviates by {worst:.1e} of the longest row, "
                f"accepted for {dtype} is {bound:.0e}"
            )
        result[name] = worst
    return result


def longest_row(x: Tensor) -> Tensor:
    return (x if x.dim() > 1 else x[:, None]).norm(dim=-1).max()


# Outputs that the probe looks at; those of three dimensions are states of tokens.
_COMPARED = ("last_hidden_state", "pooler_output", "logits")


@dataclass(frozen=True)
class Probe:
    """Batches for an encoder, mixed lengths and one short query; states are compared at the tokens."""

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

    def run(self, model: nn.Module, forward: Callable) -> dict[str, Tensor]:
        """The outputs of one of the model's forwards, given the call's arguments as a dict."""
        found: dict[str, list[Tensor]] = {}
        for batch in self.batches:
            with evaluating(model):
                output = forward({**batch, "return_dict": True})
            tokens = batch["attention_mask"] != 0
            for name in _COMPARED:
                if (value := output.get(name)) is not None:
                    found.setdefault(name, []).append(value[tokens] if value.dim() == 3 else value)
        return {name: torch.cat(parts) for name, parts in found.items()}
