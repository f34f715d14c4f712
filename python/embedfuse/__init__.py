"""Fast embedding models: patch a live model in place, or call its fused kernels directly."""

import importlib
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from embedfuse import losses
    from embedfuse.embedder import Embedder

    __version__: str


def __getattr__(name: str):
    if name == "Embedder":  # on first use, because it imports transformers
        from embedfuse.embedder import Embedder

        return Embedder
    if name == "losses":  # on first use, because inference does not need it
        return importlib.import_module("embedfuse.losses")
    if name == "__version__":
        from embedfuse.compatibility import version

        return version("embedfuse") or "0+source"  # a source tree that was never installed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
