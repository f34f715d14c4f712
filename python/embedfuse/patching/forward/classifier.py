"""…ForSequenceClassification (rerankers): a packed encoder under the original's own head and loss."""

from collections.abc import Iterator

from torch import Tensor, nn

from embedfuse.packing import Packed
from embedfuse.patching.forward.encoder import PackedEncoder
from embedfuse.patching.forward.packed_model import padded_call
from embedfuse.patching.report import PatchError, Report
from embedfuse.patching.swap import Options, Patched


class PackedClassifier(PackedEncoder):
    """The head reads the first row of each sequence, so no other row is padded back.

    Head, loss and output are the original forward itself, run with these rows where the base model
    would be called. The base model inside keeps its class: what the packed path cannot serve runs on
    the original from end to end.
    """

    # Path of the module that takes row 0 of the states.
    first_row_reader: str
    head_pooling = "cls"
    # The second comes from transformers' Trainer, and the originals ignore it.
    head_arguments = frozenset({"labels", "num_items_in_batch"})

    @classmethod
    def install(cls, model: nn.Module, options: Options) -> Report:
        if isinstance(model.base_model, Patched):
            raise PatchError(
                f"{model.base_model_prefix} is patched on its own: unpatch it, then patch the whole"
            )
        return super().install(model, options)

    def assumed(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().assumed()
        yield self.first_row_reader, self.get_submodule(self.first_row_reader)

    def misfit(self, packed: Packed) -> str | None:
        if packed.starts_padded:
            return "left padding: the classifier reads column 0, where a row has no token"
        return None

    def output_of(self, call: dict, states: Tensor, packed: Packed):
        return self._head(states, **call)

    def sequence_logits(self, input_ids: Tensor, packed: Packed) -> Tensor:
        """(batch, labels) of token ids (tokens,) that never were padded."""
        found = self.token_states(input_ids, packed, pooling="cls")
        if found is None:
            return self(**padded_call(input_ids, packed, self.config.pad_token_id)).logits
        return self._head(found[0], input_ids).logits

    def _head(self, rows: Tensor, *args, **kwargs):
        """The original forward's output, given the states (batch, hidden) of the first tokens."""
        base_output = self.make_output(rows[:, None], return_dict=True)
        return self.original.forward(_BaseModelDone(self, base_output), *args, **kwargs)


class _BaseModelDone:
    """A model whose base model has run: called by the model's forward, it returns `base_output`."""

    def __init__(self, model: nn.Module, base_output):
        self._model = model
        setattr(self, model.base_model_prefix, lambda *args, **kwargs: base_output)

    def __getattr__(self, name: str):
        return getattr(self._model, name)
