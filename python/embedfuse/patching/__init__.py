"""patch, unpatch, patched, embed: a live model made fast in place, and put back exactly."""

from embedfuse.patching.api import embed, patch, patched, report, unpatch
from embedfuse.patching.report import PatchError, Report

__all__ = ["PatchError", "Report", "embed", "patch", "patched", "report", "unpatch"]
