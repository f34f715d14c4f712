"""Make a live model faster in place, and undo it exactly."""

from embedfuse.patching.api import embed, is_patched, patch, patched, report, unpatch, warm_up
from embedfuse.patching.report import PatchError, Report

__all__ = [
    "PatchError",
    "Report",
    "embed",
    "is_patched",
    "patch",
    "patched",
    "report",
    "unpatch",
    "warm_up",
]

# Modules of 0.1 are found in old_paths/, until 0.3.
__path__ += [f"{folder}/old_paths" for folder in __path__]
