"""embedfuse: embedding models made fast in place, and the kernels that do it."""

from embedfuse import ops
from embedfuse.patching import PatchError, Report, embed, patch, patched, report, unpatch
from embedfuse.registry import BackendError, use_backend

__all__ = [
    "BackendError",
    "PatchError",
    "Report",
    "embed",
    "ops",
    "patch",
    "patched",
    "report",
    "unpatch",
    "use_backend",
]
