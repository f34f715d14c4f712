"""…ForSequenceClassification (rerankers): a packed encoder under the original's own head and loss."""

from collections.abc import Iterator

from torch import Tensor, nn

from embedfuse.packing import Packed
from embedfuse.patching.forward.encoder import PackedEncoder
from embedfuse.patching.forward.tokens import PackedStates
from embedfuse.patching.report import PatchError, Report
from embedfuse.patching.swap import Options, Patched


class PackedClassifier(PackedEncoder):
    """The head reads the first row of each sequence, so only these rows are computed and padded.

    Head, loss and output come from the original forward, which gets these rows in place of a call of its
    base model. The base model keeps its class: a refused call runs the original code from end to end.
    """

    # Path of the module that takes row 0 of the states.
    first_row_reader: str
    head_pooling = "cls"
    # The second comes from transformers' Trainer; the originals ignore it.
    head_arguments = frozenset({"labels", "num_items_in_batch"})

    @classmethod
    def install(cls, model: nn.Module, options: Options) -> Report:
        if isinstance(model.base_model, Patched):
            raise PatchError(
                f"{model.base_model_prefix} is patched on its own: unpatch it, then patch the whole"
            )
        return super().install(model, options)

    def stock_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().stock_modules()
        yield self.first_row_reader, self.get_submodule(self.first_row_reader)

    def batch_refusal(self, call: dict, packed: Packed) -> str | None:
        if packed.starts_padded:
            return "left padding: the classifier reads column 0, where a row has no token"
        return None

    def output_of(self, call: dict, found: PackedStates):
        return self._head(found.states, **call)

    def sequence_logits(self, input_ids: Tensor, packed: Packed) -> Tensor:
        """(sequences, labels) of token ids (tokens,) that were never padded; a refused batch is padded."""
        found = self.packed_states({"input_ids": input_ids}, packed, self.head_pooling)
        if found is None:
            return self(**self.padded_call(input_ids, packed)).logits
        return self._head(found.states, input_ids).logits

    def _head(self, rows: Tensor, *args, **kwargs):
        """The original forward's output, given the states (sequences, hidden) of the first tokens."""
        base_output = self.make_output(rows[:, None], return_dict=True)
        return self.original.forward(_WithBaseOutput(self, base_output), *args, **kwargs)


class _WithBaseOutput:
    """A model as its own forward sees it, except that its base model returns `base_output`."""

    def __init__(self, model: nn.Module, base_output):
        self._model = model
        setattr(self, model.base_model_prefix, lambda *args, **kwargs: base_output)

    def __getattr__(self, name: str):
        return getattr(self._model, name)
