"""embedfuse: embedding models made fast in place, and the kernels that do it."""

import importlib

from embedfuse import ops
from embedfuse.patching import (
    PatchError,
    Report,
    embed,
    is_patched,
    patch,
    patched,
    report,
    unpatch,
    warm_up,
)
from embedfuse.pipeline.presets import PRESETS, Preset
from embedfuse.registry import BackendError, use_backend

__all__ = [
    "PRESETS",
    "BackendError",
    "Embedder",
    "PatchError",
    "Preset",
    "Report",
    "embed",
    "is_patched",
    "losses",
    "ops",
    "patch",
    "patched",
    "report",
    "unpatch",
    "use_backend",
    "warm_up",
]


def __getattr__(name: str):
    if name == "Embedder":  # on first use, because it imports transformers
        from embedfuse.embedder import Embedder

        return Embedder
    if name == "losses":  # on first use: inference needs none of it
        return importlib.import_module("embedfuse.losses")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
