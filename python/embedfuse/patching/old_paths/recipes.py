"""Old path of embedfuse.patching.families, for patched classes that 0.1 pickled."""

from embedfuse.deprecation import warn_moved
from embedfuse.patching.families import patched_class as recipe  # noqa: F401

warn_moved(__name__, "embedfuse.patching.families")
