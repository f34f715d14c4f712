"""What holds a model and its tokenizer: texts end in the token that the checkpoint wants there."""

from embedfuse.patching.wrapper import PatchedWrapper
from embedfuse.pipeline.eos import AppendedEnd, append_end, lacks_end, says_add_eos
from embedfuse.pipeline.presets import find_preset

_END = "tokenizer"  # in Report.repaired and Report.unrepaired


class EndsTexts(PatchedWrapper):
    """Mixin of a holder whose `tokenizer` is made to add the token; swap_out puts it back."""

    # Not in _embedfuse, whose copies leave such things behind.
    _embedfuse_end: AppendedEnd | None = None

    def repair_end(self, last_token: bool) -> None:
        """Have the tokenizer add it if it does not. last_token: whether that token's state is the vector."""
        report = self._embedfuse.report
        try:
            if token := missing_end(self.tokenizer, self.inner_model(self).config, last_token):
                self._embedfuse_end = append_end(self.tokenizer, token)
                report.repaired[_END] = (
                    f"added no {token}, which the checkpoint wants after each text"
                )
        except ValueError as error:
            report.unrepaired[_END] = str(error)

    def swap_out(self) -> None:
        if self._embedfuse_end is not None:
            self._embedfuse_end.undo()
            self._embedfuse.report.repaired.pop(_END, None)
            del self._embedfuse_end
        super().swap_out()


def missing_end(tokenizer, config, last_token: bool) -> str | None:
    """The token that should end every text, if the tokenizer does not add it.

    It is eos_token where tokenizer_config.json says so, and else that of the family's preset where the
    last token is pooled.
    """
    if tokenizer is None:
        return None
    name = tokenizer.name_or_path
    hub = {"local_files_only": True, "revision": getattr(config, "_commit_hash", None)}
    token = None
    if last_token:
        names = [n for n in (name, config.name_or_path) if n]
        token = find_preset(names, config.model_type).end_token
    if not token and says_add_eos(name, hub):
        token = tokenizer.eos_token
    return token if token and lacks_end(tokenizer, token) else None
