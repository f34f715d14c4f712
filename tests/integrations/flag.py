"""What the tests of FlagEmbedding's objects share: texts, and spies on the forwards of patched models."""

from contextlib import contextmanager

import pytest
import torch

from embedfuse.cli.corpus import stdlib_docstrings
from embedfuse.patching.forward.packed_model import PackedModel

DOCSTRINGS = [text for text in stdlib_docstrings(100) if len(text) < 800][:60]
ODD = ["", " ", "emoji 🎉", "日本語のテキストです", "word " * 300, "<s> </s>", "a\nb\tc"]
TEXTS = [*DOCSTRINGS, *ODD]


@contextmanager
def original_forbidden():
    """Inside, a patched model that runs the original's padded forward fails the test."""

    def forbidden(self, call):
        pytest.fail("the original's padded forward was called")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedModel, "original_forward", forbidden)
        yield


@contextmanager
def counted(model: torch.nn.Module):
    """A list that gets the number of tokens of each packed forward."""
    tokens = []
    run = type(model).run_layers

    def spy(self, batch, rows):
        tokens.append(batch.packed.tokens)
        return run(self, batch, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "run_layers", spy)
        yield tokens
