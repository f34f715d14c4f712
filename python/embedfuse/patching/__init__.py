"""patch, unpatch, patched, warm_up, embed: a live model made fast in place, and put back exactly."""

from embedfuse.patching.api import embed, patch, patched, report, unpatch, warm_up
from embedfuse.patching.report import PatchError, Report

__all__ = ["PatchError", "Report", "embed", "patch", "patched", "report", "unpatch", "warm_up"]
