"""Old path of embedfuse.ops, for objects that 0.1 pickled."""

from embedfuse.deprecation import warn_moved
from embedfuse.ops import Csr  # noqa: F401

warn_moved(__name__, "embedfuse.ops")
