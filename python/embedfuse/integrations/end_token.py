"""Wrappers of a model and a tokenizer: the tokenizer ends texts in the token that the checkpoint expects."""

from typing import Any

from embedfuse.patching.wrapper import PatchedWrapper
from embedfuse.pipeline.eos import AppendedEnd, append_end, lacks_end, says_add_eos
from embedfuse.pipeline.presets import find_preset

_END = "tokenizer"  # in Report.repaired and Report.unrepaired


class EndsTexts(PatchedWrapper):
    """Mixin of a wrapper with a `tokenizer`, which is made to add the token until swap_out."""

    tokenizer: Any
    # Not in _embedfuse, because a copy of the wrapper needs it too.
    _embedfuse_end: AppendedEnd | None = None

    def repair_end(self, last_token: bool) -> None:
        """Make the tokenizer add the token if it does not. last_token: whether the last token is pooled."""
        report = self._embedfuse.report
        try:
            if token := missing_end(self.tokenizer, self.inner_model(self).config, last_token):
                self._embedfuse_end = append_end(self.tokenizer, token)
                report.repaired[_END] = (
                    f"added no {token}, which the checkpoint expects after each text"
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
    """The token that should end every text, if the tokenizer does not add it; None otherwise.

    Where the last token is pooled, it is that of the family's preset, if that names one. Otherwise it is
    eos_token, if tokenizer_config.json says that it is added.
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
