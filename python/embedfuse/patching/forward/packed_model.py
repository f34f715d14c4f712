"""PackedModel: a transformers model whose forward runs without padding.

A call passes these stages. It comes in by `forward`, or by `packed_states` where states are pooled next.

| stage     | what happens                                                 | where                       |
|-----------|--------------------------------------------------------------|-----------------------------|
| admission | `admit` looks at the model as it is now, the call and the    | layout.py, admission.py     |
|           | batch; a refusal says why the original forward has to run    |                             |
| tokens    | `tokens_of`: ids, token types, positions, without padding    | tokens.py, packing.py       |
| layers    | `run`: a CUDA graph replays a small batch, or `run_layers`   | graph_replay.py, encoder.py |
|           | runs embeddings and layers                                   | or decoder.py               |
| output    | `output_of`: padded states, or the logits of a classifier;   | encoder.py, decoder.py or   |
|           | or `PackedStates.pool`: a vector of each sequence            | classifier.py; tokens.py    |

A refused call runs on `original_forward`, and the report counts it under the reason.
"""

import functools
import inspect
import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from embedfuse.nn.attention import cuda_refusals
from embedfuse.nn.decoder import DecoderLayer
from embedfuse.nn.encoder import EncoderLayer
from embedfuse.nn.graphs import GraphCache
from embedfuse.nn.prefixes import PrefixCache
from embedfuse.nn.programs import Programs
from embedfuse.packing import Irregular, Packed, one_each, pack, pad_right
from embedfuse.patching.check import Probe, check_loaded, parameter_bytes, self_check
from embedfuse.patching.forward.admission import UNREPORTED, call_refusal
from embedfuse.patching.forward.graph_replay import replayed
from embedfuse.patching.forward.tokens import Batch, PackedStates, Tokens, pooled_rows
from embedfuse.patching.layout import Layout, has_own_forward, is_hooked
from embedfuse.patching.report import PatchError, Report
from embedfuse.patching.swap import Options, Patched, PatchState, outlives_patch
from embedfuse.patching.tree import telling_changes


@dataclass(eq=False)
class ModelState(PatchState):
    """What a patched transformers model carries too.

    checked: kinds of custom modules with which the self-check passed. failed: those with which it failed, and
    its error. lock: for making a new layout; reentrant, because the self-check runs the model.
    """

    layout: Layout | None = None
    checked: tuple = ()
    failed: dict[tuple, str] = field(default_factory=dict)
    prefixes: PrefixCache = field(default_factory=PrefixCache)
    graphs: GraphCache = field(default_factory=GraphCache)
    lock: threading.RLock = field(default_factory=threading.RLock)


class PackedModel(Patched):
    """A transformers model that runs without padding. Families give the abstract methods."""

    state_class = ModelState
    _embedfuse: ModelState
    _argument_names: tuple[str, ...]
    # Of the transformers model.
    config: Any
    device: torch.device
    dtype: torch.dtype
    __call__: Callable[..., Any]
    # Poolings for which run_layers takes `rows`.
    pruned_poolings: tuple[str, ...] = ("cls", "last")
    # Accepted values of Options: attention next to the model's own, and reuse_prefixes.
    attentions: tuple[str, ...] = ()
    reuses: tuple[str, ...] = ("off", "batch")
    # Of a model with a head: how it pools, and the arguments of forward that only the head reads.
    head_pooling: str | None = None
    head_arguments: frozenset[str] = frozenset()

    @classmethod
    @abstractmethod
    def probe(cls, model: nn.Module) -> Probe:
        """Inputs on which patched and original have to agree."""

    @abstractmethod
    def model_refusal(self) -> str | None:
        """Why a model of this family, as it is now, has to run on its original forward."""

    def batch_refusal(self, call: dict, packed: Packed) -> str | None:
        """Why this batch has to run on the original forward of this family."""
        return None

    @abstractmethod
    def read_layers(self) -> list[EncoderLayer] | list[DecoderLayer]:
        """The model's layers, wherever it keeps their modules."""

    def make_programs(self, layers: list) -> Programs | None:
        """What runs these layers in one call."""
        return None

    @abstractmethod
    def runs_packed(self, path: str) -> bool:
        """Whether the packed forward calls the module of this path, with tokens (tokens, ...)."""

    def buffers_read(self) -> tuple[Tensor, ...]:
        """Buffers whose values `model_refusal` reads."""
        return ()

    @abstractmethod
    def check_tokens(self, batch: Batch) -> None:
        """Raise for ids or lengths that the embedding tables do not have."""

    @abstractmethod
    def longest_sequence(self) -> int:
        """Tokens that the model was made for."""

    @abstractmethod
    def run_layers(self, batch: Batch, rows: Tensor | None) -> Tensor:
        """(tokens, hidden) states, or those of `rows`, which holds one row of each sequence."""

    def replays(self, packed: Packed, bucket_tokens: int) -> bool:
        """Whether a CUDA graph may run this batch in a bucket of so many tokens, and is faster."""
        return False

    @abstractmethod
    def make_output(self, states: Tensor, return_dict: bool):
        """The original's output object from padded states."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "original" in cls.__dict__:
            cls._argument_names = tuple(inspect.signature(cls.original.forward).parameters)[1:]
            # Callers read the signature to learn which arguments the model takes.
            named = functools.wraps(cls.original.forward)
            cls.forward = named(outlives_patch(PackedModel.forward))

    @classmethod
    def tower(cls, model: nn.Module) -> nn.Module:
        return model if model.base_model is model else super().tower(model)

    @classmethod
    def install(cls, model: nn.Module, options: Options) -> Report:
        if options.attention not in (None, *cls.attentions):
            raise ValueError(f"attention={options.attention!r}: {cls.__name__} accepts None")
        if options.reuse_prefixes not in cls.reuses:
            raise ValueError(
                f"reuse_prefixes={options.reuse_prefixes!r}: {cls.__name__} accepts "
                f"{' and '.join(cls.reuses)}; it has no causal attention"
            )
        check_loaded(model)
        report = Report(cls.__name__)
        before = parameter_bytes(model)
        cls.swap_in(model, report, options)
        try:
            layout = model._embedfuse.layout = model._make_layout()
            if has_own_forward(model):
                layout.refusal = (
                    "the model has a forward of its own (offloaded, compiled or wrapped)"
                )
            if layout.refusal:
                report.refused["forward"] = layout.refusal
            else:
                report.deviations = self_check(model, layout)
                report.fused.append(f"{len(layout.layers)} layers without padding")
                report.fused += attention_in_use(model, layout)
        except BaseException:
            model.uninstall()
            raise
        report.memory_bytes = parameter_bytes(model) - before
        report.original_calls.clear()  # those of the self-check
        return report

    def uninstall(self) -> None:
        self._embedfuse.graphs.forget()
        self.swap_out()

    def forward(self, *args, **kwargs):
        names = self._argument_names
        if len(args) > len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            return self.original.forward(self, *args, **kwargs)  # for its TypeError
        call = dict(zip(names, args, strict=False)) | kwargs
        batch, refusal = self.admit(call)
        if batch is None:
            if refusal != UNREPORTED:
                self._embedfuse.report.original(refusal)
            return self.original_forward(call)
        return self.output_of(call, self.run(batch, self.head_pooling))

    def original_forward(self, call: dict):
        """The original's output for the arguments of a forward call."""
        return self.original.forward(self, **call)

    def packed_states(
        self, call: dict, packed: Packed | None = None, pooling: str | None = None
    ) -> PackedStates | None:
        """The states of a forward call, without padding; None where the caller has to call the model.

        Nothing is reported: the model's own `forward` does.

        Args:
            call: Arguments of `forward`.
            packed: None, or where the sequences are in input_ids (tokens,) that were never padded.
            pooling: What the states will be pooled with. Where that reads one row of each sequence
                (pruned_poolings), only these rows are returned, as sequences of one token.
        """
        if is_hooked(self):  # hooks expect a call
            return None
        batch, _ = self.admit(call, packed)
        return None if batch is None else self.run(batch, pooling)

    def sequence_states(
        self, input_ids: Tensor, packed: Packed, pooling: str | None = None
    ) -> PackedStates:
        """As packed_states, of token ids (tokens,) that were never padded; a refused batch is padded."""
        found = self.packed_states({"input_ids": input_ids}, packed, pooling)
        if found is not None:
            return found
        call = self.padded_call(input_ids, packed)
        states = self(**call, return_dict=True).last_hidden_state
        return PackedStates(states[call["attention_mask"] != 0], packed)

    def padded_call(self, input_ids: Tensor, packed: Packed) -> dict[str, Tensor]:
        """Arguments of `forward` for token ids (tokens,) that were never padded."""
        ids, mask = pad_right(input_ids, packed, self.config.pad_token_id or 0)
        return {"input_ids": ids, "attention_mask": mask}

    def admit(self, call: dict, packed: Packed | None = None) -> tuple[Batch | None, str | None]:
        """The batch to run of a forward call, or None and the refusal: why the original has to run.

        call, packed: as in packed_states.
        """
        # A compiler gets the original to trace, and deals with padding in its own way.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None, UNREPORTED
        layout = self.current_layout()
        refusal = layout.refusal or call_refusal(self, call)
        if refusal is None and packed is None:
            try:
                packed = pack(call["input_ids"], call.get("attention_mask"))
            except Irregular as error:
                refusal = error.reason
        if refusal is None:
            refusal = self.batch_refusal(call, packed)
        if refusal is not None:
            return None, refusal
        return Batch(layout, packed, self.tokens_of(call, packed)), None

    def tokens_of(self, call: dict, packed: Packed) -> Tokens:
        """What the embedding layer reads of a forward call."""
        return Tokens.of(call, packed)

    def run(self, batch: Batch, pooling: str | None) -> PackedStates:
        """The states of an admitted batch, as packed_states returns them."""
        packed = batch.packed
        self.check_tokens(batch)
        if pooling not in self.pruned_poolings or 0 in packed.lengths:
            pooling = None
        states = replayed(self, batch, pooling)
        if states is None:
            states = self.run_layers(batch, pooled_rows(packed, pooling))
        if pooling is not None:
            packed = one_each(packed.sequences, packed.cu_seqlens.device)
        return PackedStates(states, packed)

    def output_of(self, call: dict, found: PackedStates):
        """What `forward` returns for a call whose states, pooled by head_pooling, these are."""
        return_dict = call.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return self.make_output(found.packed.pad(found.states), return_dict)

    def current_layout(self) -> Layout:
        """The layout of the model as it is now."""
        state = self._embedfuse
        layout = state.layout
        if layout is not None and not layout.is_of(self):
            # A replica (DataParallel, copy.copy) shares the state.
            return self._checked(self._make_layout())
        if layout is None or not layout.is_current(self):
            with state.lock:
                if state.layout is layout:
                    state.prefixes.forget()
                    state.layout = self._checked(self._make_layout())
                layout = state.layout
        return layout

    def _make_layout(self) -> Layout:
        layout = Layout(self, self.buffers_read())
        if layout.refusal is None:
            layout.refusal = self.model_refusal()
        if layout.refusal is None:
            layout.layers = self.read_layers()
            layout.programs = self.make_programs(layout.layers)
        return layout

    def _checked(self, layout: Layout) -> Layout:
        """The layout, with a refusal if its custom modules are new and the self-check fails with them."""
        state, kinds = self._embedfuse, layout.custom_kinds
        if layout.refusal is None and kinds not in ((), state.checked):
            if kinds not in state.failed:
                try:
                    self_check(self, layout)
                except PatchError as error:
                    state.failed = {kinds: str(error)}
            layout.refusal = state.failed.get(kinds)
        return layout

    def train(self, mode: bool = True):
        # sentence-transformers calls eval() before every batch; to read the flags is faster than to set them.
        layout = self._embedfuse.layout
        known = layout is not None and layout.is_of(self) and layout.is_current(self)
        if known and all(module.training is mode for module in (self, *layout.modules)):
            return self
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        return super()._apply(telling_changes(fn, self._forget), recurse)

    def _forget(self) -> None:
        """What depends on the weights, or on their dtype and device."""
        self._embedfuse.prefixes.forget()
        self._embedfuse.graphs.forget()
        self._embedfuse.layout = None  # model_refusal may depend on the dtype


def attention_in_use(model: PackedModel, layout: Layout) -> list[str]:
    """For the report of a model on a GPU: what computes attention there in inference."""
    if model.device.type != "cuda" or not layout.layers:
        return []
    answers = cuda_refusals(model.dtype, layout.layers[0].head_dim, model.device)
    return [f"attention by {next(name for name, reason in answers.items() if reason is None)}"]
