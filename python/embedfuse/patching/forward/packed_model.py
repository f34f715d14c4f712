"""PackedModel: a transformers model whose forward runs on packed tokens."""

import contextlib
import contextvars
import functools
import inspect
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from embedfuse.nn.attention import cuda_refusals
from embedfuse.nn.decoder import DecoderLayer
from embedfuse.nn.encoder import EncoderLayer
from embedfuse.packing import Irregular, Packed, one_each, pack
from embedfuse.patching.check import Probe, check_loaded, parameter_bytes
from embedfuse.patching.forward.graph_replay import replayed
from embedfuse.patching.forward.tokens import Tokens, rows_of
from embedfuse.patching.layout import Layout, has_own_forward, is_hooked
from embedfuse.patching.report import PatchError, Report
from embedfuse.patching.self_check import self_check
from embedfuse.patching.swap import Options, Patched, outlives_patch

# Arguments that the packed forward serves; any other that is not None goes to the original.
_SERVED = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "return_dict"}
# Accepted when they ask for nothing.
_FLAGS = {"output_attentions", "output_hidden_states", "use_cache"}

# Why a holder of a model wants the original forward for now.
_wanted_original = contextvars.ContextVar("embedfuse_wanted_original", default=None)


@contextlib.contextmanager
def on_original(reason: str = "") -> Iterator[None]:
    """Inside, patched models run on their original forward; the report counts such calls under the reason."""
    token = _wanted_original.set(reason)
    try:
        yield
    finally:
        _wanted_original.reset(token)


def padded_call(input_ids: Tensor, packed: Packed, padding_idx: int | None) -> dict[str, Tensor]:
    """Arguments of a transformers forward for token ids (tokens,), padded on the right."""
    parts = input_ids.split(packed.lengths)
    padded = nn.utils.rnn.pad_sequence(parts, True, padding_idx or 0)
    lengths = torch.tensor(packed.lengths, device=input_ids.device)[:, None]
    mask = torch.arange(padded.shape[1], device=input_ids.device) < lengths
    return {"input_ids": padded, "attention_mask": mask.long()}


class PackedModel(Patched):
    """A transformers model that runs without padding. Recipes give the five methods below."""

    _argument_names: tuple[str, ...]
    # Poolings for which run_packed takes `rows`.
    pruned_poolings: tuple[str, ...] = ("cls", "last")
    # What Options may ask for, attention besides the model's own.
    attentions: tuple[str, ...] = ()
    reuses: tuple[str, ...] = ("off", "batch")
    # Of a model with a head: the rows that it reads, and arguments that are its alone.
    head_pooling: str | None = None
    head_arguments: frozenset[str] = frozenset()

    @classmethod
    @abstractmethod
    def probe(cls, model: nn.Module) -> Probe:
        """Inputs on which patched and original have to agree."""

    @abstractmethod
    def refusal(self) -> str | None:
        """Why a model of this family, as it is now, has to run on its own forward."""

    @abstractmethod
    def read_layers(self) -> list[EncoderLayer] | list[DecoderLayer]:
        """The model's layers, wherever it keeps their modules."""

    @abstractmethod
    def takes_rows(self, path: str) -> bool:
        """Whether the packed forward gives the module of this path tokens without a batch."""

    def buffers_read(self) -> tuple[Tensor, ...]:
        """Buffers whose values `refusal` looks at."""
        return ()

    @abstractmethod
    def check_tokens(self, tokens: Tokens, packed: Packed) -> None:
        """Raise for ids or lengths that the embedding tables do not have."""

    @abstractmethod
    def run_packed(
        self, layout: Layout, packed: Packed, tokens: Tokens, rows: Tensor | None
    ) -> Tensor:
        """(tokens, hidden) states, or those of `rows`, which holds one row of each sequence."""

    @abstractmethod
    def make_output(self, states: Tensor, return_dict: bool):
        """The original's output object from padded states."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "original" in cls.__dict__:
            cls._argument_names = tuple(inspect.signature(cls.original.forward).parameters)[1:]

            # Callers read the signature to learn which arguments the model takes.
            @outlives_patch
            @functools.wraps(cls.original.forward)
            def forward(self, *args, **kwargs):
                return self._forward(*args, **kwargs)

            cls.forward = forward

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
                own = "the model has a forward of its own (offloaded, compiled or wrapped)"
                report.refused["forward"] = layout.refusal = own
            elif layout.refusal:
                report.refused["forward"] = layout.refusal
            else:
                report.deviations = self_check(model, layout)
                report.fused.append(f"{len(layout.layers)} layers without padding")
                report.fused += attention_in_force(model, layout)
        except BaseException:
            model.uninstall()
            raise
        report.memory_bytes = parameter_bytes(model) - before
        report.original_calls.clear()  # the probe's own
        return report

    def uninstall(self) -> None:
        self._embedfuse.graphs.forget()
        self.swap_out()

    def _forward(self, *args, **kwargs):
        names = self._argument_names
        if len(args) > len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            return self.original.forward(self, *args, **kwargs)  # for its TypeError
        return self._serve(dict(zip(names, args, strict=False)) | kwargs)

    def _serve(self, call: dict):
        output = self.packed_output(call)
        return self.run_original(call) if output is None else output

    def run_original(self, call: dict):
        """The original's output for a call's arguments."""
        return self.original.forward(self, **call)

    def packed_output(self, call: dict):
        """What forward returns, from the packed states; None when the original has to run."""
        of_tower = {k: v for k, v in call.items() if k not in self.head_arguments}
        found = self.packed_states(of_tower, self.head_pooling)
        return None if found is None else self.output_of(call, *found)

    def output_of(self, call: dict, states: Tensor, packed: Packed):
        """What forward returns for a call whose packed states, or those of head_pooling, these are."""
        return_dict = call.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return self.make_output(packed.pad(states), return_dict)

    def packed_states(
        self, call: dict, pooling: str | None = None, count: bool = True
    ) -> tuple[Tensor, Packed] | None:
        """The states of a forward call's arguments, packed; None when the original has to run.

        pooling: what the caller will pool with. Where that reads one row of each sequence
        (pruned_poolings), only these rows come back, as sequences of one token.
        count: whether to count that in the report; a caller that goes on to `forward` leaves it to it.
        """
        # The original is traced as it is: under a compiler the padding is the compiler's business.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        layout, packed, reason = self._admit(call)
        if reason is not None:
            if count and reason:
                self._embedfuse.report.original(reason)
            return None
        return self.run(layout, packed, self.tokens_of(call, packed), pooling)

    def _admit(self, call: dict) -> tuple[Layout, Packed | None, str | None]:
        """The layout, how to pack the call's tokens, and why the original has to run instead, if it has."""
        layout, packed = self._current_layout(), None
        reason = layout.refusal or self._unserved(call)
        if reason is None:
            try:
                packed = pack(call["input_ids"], call.get("attention_mask"))
                reason = self.misfit(packed)
            except Irregular as error:
                reason = error.reason
        return layout, packed, reason

    def tokens_of(self, call: dict, packed: Packed) -> Tokens:
        """What the embedding layer reads of a call's arguments."""
        return Tokens.of(call, packed)

    def token_states(
        self, input_ids: Tensor, packed: Packed, pooling: str | None = None
    ) -> tuple[Tensor, Packed] | None:
        """The states of token ids (tokens,) that never were padded; otherwise as packed_states."""
        layout = self._current_layout()
        reason = layout.refusal or self._unserved({"input_ids": input_ids})
        if reason is not None or is_hooked(self):
            return None  # a caller that goes on to `forward` leaves the count to it
        return self.run(layout, packed, Tokens(input_ids), pooling)

    def sequence_states(
        self, input_ids: Tensor, packed: Packed, pooling: str | None = None
    ) -> tuple[Tensor, Packed]:
        """States of token ids that never were padded, as token_states; what it refuses is padded."""
        found = self.token_states(input_ids, packed, pooling)
        if found is not None:
            return found
        call = padded_call(input_ids, packed, self.config.pad_token_id)
        states = self(**call, return_dict=True).last_hidden_state
        return states[call["attention_mask"] != 0], packed

    def run(
        self, layout: Layout, packed: Packed, tokens: Tokens, pooling: str | None
    ) -> tuple[Tensor, Packed]:
        """States as packed_states returns them."""
        self.check_tokens(tokens, packed)
        if pooling not in self.pruned_poolings or 0 in packed.lengths:
            pooling = None
        states = replayed(self, layout, packed, tokens, pooling)
        if states is None:
            states = self.run_packed(layout, packed, tokens, rows_of(packed, pooling))
        if pooling is None:
            return states, packed
        return states, one_each(packed.sequences, packed.cu_seqlens.device)

    def replays(self, packed: Packed, bucket_tokens: int) -> bool:
        """Whether a CUDA graph may run this batch in a bucket of so many tokens, the better for it."""
        return False

    def misfit(self, packed: Packed) -> str | None:
        """Why the original has to serve a batch of this shape."""
        return None

    def _unserved(self, call: dict) -> str | None:
        if (wanted := _wanted_original.get()) is not None:
            return wanted
        for name, value in call.items():
            if value is not None and name not in _SERVED and not (name in _FLAGS and not value):
                return f"called with {name}"
        for name in _FLAGS - {"use_cache"}:
            if call.get(name) is None and getattr(self.config, name, False):
                return f"config.{name} is set"
        input_ids = call.get("input_ids")
        if type(input_ids) is not Tensor:
            return f"input_ids is a {type(input_ids).__name__}"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "the call is inside a transform of torch.func"
        if forward_ad._current_level >= 0:
            return "the call is inside forward-mode differentiation"
        if torch.is_grad_enabled() and self.config._attn_implementation == "eager":
            return "eager attention with gradients, which can be differentiated twice"
        if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return "the call is captured into a CUDA graph"
        mask = call.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            return f"attention_mask is a {type(mask).__name__}"
        if mask is not None and mask.dim() != 2:
            return f"attention_mask has {mask.dim()} dimensions"
        return None

    def _make_layout(self) -> Layout:
        layout = Layout(self, self.buffers_read())
        if layout.refusal is None:
            layout.refusal = self.refusal()
        if layout.refusal is None:
            layout.layers = self.read_layers()
        return layout

    def _current_layout(self) -> Layout:
        state = self._embedfuse
        layout = state.layout
        if layout is not None and not layout.is_of(self):
            # A replica (DataParallel, copy.copy) shares the state.
            return self._trusted(self._make_layout())
        if layout is None or not layout.is_current(self):
            with state.lock:
                if state.layout is layout:
                    state.prefixes.forget()
                    state.layout = self._trusted(self._make_layout())
                layout = state.layout
        return layout

    def _trusted(self, layout: Layout) -> Layout:
        """The layout, refused where foreign modules are new in it and the self-check fails with them."""
        state, kinds = self._embedfuse, layout.foreign_kinds
        if layout.refusal is None and kinds not in ((), state.trusted):
            if kinds not in state.distrusted:
                try:
                    self_check(self, layout)
                except PatchError as error:
                    state.distrusted = {kinds: str(error)}
            layout.refusal = state.distrusted.get(kinds)
        return layout

    def train(self, mode: bool = True):
        # sentence-transformers calls eval() before every batch: look at the modes, set none anew.
        layout = self._embedfuse.layout
        known = layout is not None and layout.is_of(self) and layout.is_current(self)
        if known and all(module.training is mode for module in (self, *layout.modules)):
            return self
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._embedfuse.prefixes.forget()
        self._embedfuse.graphs.forget()  # before, because they hold the weights that go
        self._embedfuse.layout = None  # the dtype may decide
        return super()._apply(fn, recurse)


def attention_in_force(model: PackedModel, layout: Layout) -> list[str]:
    """For the report of a model on a GPU: what computes attention there in inference."""
    if model.device.type != "cuda" or not layout.layers:
        return []
    answers = cuda_refusals(model.dtype, layout.layers[0].head_dim, model.device)
    return [f"attention by {next(name for name, reason in answers.items() if reason is None)}"]
