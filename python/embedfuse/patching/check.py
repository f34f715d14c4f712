"""The self-check: whether a patched model computes what it did, on probe batches through both forwards."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from embedfuse.ops.checks import is_dense
from embedfuse.packing import pack
from embedfuse.patching.forward.graph_replay import device_refusal
from embedfuse.patching.forward.tokens import Batch
from embedfuse.patching.layout import Layout, has_own_forward, name_of
from embedfuse.patching.report import PatchError

# Accepted deviations (see `deviations`). Both forwards round differently in every layer: on BGE-M3's
# 24 layers with random weights, bfloat16 differs by 0.03 to 0.04, and positions that are wrong by one move
# the outputs by 0.57 to 0.9.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.12}
# Where torch may round what fp32 matrices are multiplied from. Padded and packed rows are then rounded
# differently: TF32 on 24 layers of 1,024 columns makes 1.2e-3.
BOUNDS_OF_PRECISION = {"tf32": BOUNDS[torch.float16], "bf16": BOUNDS[torch.bfloat16]}


def self_check(model: nn.Module, layout: Layout) -> dict[str, float]:
    """Deviations of a patched model's packed forward from its original one. PatchError if too large.

    One custom module of each class is also run alone, to see whether it mixes rows.
    """
    state, probe = model._embedfuse, model.probe(model)

    def packed_output(call: dict):
        packed = pack(call["input_ids"], call["attention_mask"])
        batch = Batch(layout, packed, model.tokens_of(call, packed))
        return model.output_of(call, model.run(batch, model.head_pooling))

    paths = {m: path for m, path in layout.one_of_each_kind().items() if model.runs_packed(path)}
    with _inputs_of(paths) as inputs:
        expected = probe.run(model, model.original_forward)
    tokens = probe.batches[0]["attention_mask"] != 0
    for module, x in inputs.items():
        if reason := _mixes_rows(module, x, tokens):
            raise PatchError(f"{paths[module]} is a {name_of(type(module))}, which {reason}")
    try:
        found = deviations(model, expected, probe.run(model, packed_output))
        if layout is state.layout and device_refusal(state.graphs, model.device) is None:
            # The same batches once more, which captures their graphs.
            deviations(model, expected, probe.run(model, packed_output))
    except Exception as error:
        if not layout.custom_kinds:
            raise
        raise PatchError(f"{error}{layout.suspect()}") from error
    state.checked = layout.custom_kinds
    return found


# Outputs that are compared; those of three dimensions are states of tokens.
_COMPARED = ("last_hidden_state", "pooler_output", "logits")


@dataclass(frozen=True)
class Probe:
    """Batches to run: mixed lengths, and one short query. States are compared at the tokens."""

    batches: list[dict[str, Tensor]]

    @classmethod
    def random(cls, vocabulary: int, padding_idx: int, max_length: int, device) -> "Probe":
        generator = torch.Generator(device="cpu").manual_seed(0)
        batches = []
        for lengths in ((1, 33, 7, 18), (3,)):
            lengths = [min(n, max_length) for n in lengths]
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode, no gradients, no autocast. Afterwards every module has its mode back."""
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
    """max_r |found_r - expected_r| / max_r |expected_r| of each output, with L2 norms over its rows r.

    Raises PatchError above the bound of the coarsest dtype among output and parameters.
    """
    # A head in fp32 may get states that layers in 16 bits have rounded.
    dtypes = {p.dtype for p in model.parameters()} & BOUNDS.keys()
    result = {}
    for name, reference in expected.items():
        difference = found[name].double() - reference.double()
        both_nan = reference.isnan() & found[name].isnan()
        scale = longest_row(reference.double().nan_to_num()).clamp_min(1e-6)
        worst = (longest_row(difference.masked_fill(both_nan, 0)) / scale).item()
        dtype = max({reference.dtype} | dtypes, key=BOUNDS.__getitem__)
        bound, precision = BOUNDS[dtype], matmul_precision(reference.device)
        if dtype is torch.float32:
            bound = BOUNDS_OF_PRECISION.get(precision, bound)
        if not worst <= bound:
            raise PatchError(
                f"{name}: the patched forward deviates by {worst:.1e} of the longest row, "
                f"accepted for {dtype} is {bound:.0e}"
            )
        result[name] = worst
    return result


def matmul_precision(device: torch.device) -> str:
    """What torch multiplies fp32 matrices in on this device: "ieee", "tf32" or "bf16"."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    settings = backend.matmul.fp32_precision, torch.backends.fp32_precision
    return next((setting for setting in settings if setting != "none"), "ieee")


def longest_row(x: Tensor) -> Tensor:
    return (x if x.dim() > 1 else x[:, None]).norm(dim=-1).max()


def check_loaded(model: nn.Module) -> None:
    """Raise PatchError for a model with parameters that have no values yet."""
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
    plain = [p.untyped_storage() for p in model.parameters() if is_dense(p)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in plain}.values())


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
    """How a module's result for a token depends on the other tokens of its batch; None where it does not.

    It runs with random parameters, because a new adapter adds zero. x: (batch, length, …) or (1, length, …);
    anything else has no rows of tokens. tokens: (batch, length), false at padding.
    """
    if x.shape[:2] not in (tokens.shape, (1, tokens.shape[1])):
        return None
    x = x.expand(*tokens.shape, *x.shape[2:])
    generator = torch.Generator(x.device).manual_seed(0)
    parameters = dict(module.named_parameters())
    # In 16 bits, rounding would hide what adapters mix. Tensor subclasses keep their values and dtype.
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
            return None  # it takes no other parameters; the comparison of outputs covers it
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
